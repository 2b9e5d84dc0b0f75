"""Weights of another number of classes or queries, loaded as far as their rows mean the same."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from d2dense.errors import UserError

__all__ = ["KeptRows"]


class KeptRows:
    """Which rows of a tensor can be loaded whose first dimension is another in the model.

    - Queries: the first ones. A module says which of its parameters have a row per query by
      ``query_rows``, a tuple of their names in it.
    - Classes, where the file's are known: those of the same name, apart from case, spaces and
      dashes. Recognised are tensors with a row per class, with a further one for the background at
      the end, and with four per class (boxes). Other classes of the model start
      afresh. As many classes in another order cannot be told from the same ones: such tensors are
      loaded as they are.

    Args:
        model: what is loaded into
        file_classes: names of the classes of the file; empty: not known
        classes: names of the model's

    Raises:
        UserError: no class is in both.
    """

    def __init__(
        self, model: nn.Module, *, file_classes: Sequence[str] = (), classes: Sequence[str] = ()
    ):
        self._queries = {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in model.named_modules()
            for name in getattr(module, "query_rows", ())
        }
        self._counts = len(file_classes), len(classes)
        known = {_plain(name): row for row, name in reversed(list(enumerate(file_classes)))}
        self.pairs = [
            (known[_plain(name)], row) for row, name in enumerate(classes) if _plain(name) in known
        ]
        if file_classes and not self.pairs:
            raise UserError(
                f"none of the {len(classes)} classes of the data ({', '.join(classes[:3])}...) is "
                f"one of those of the initial weights ({', '.join(file_classes[:3])}...); correct "
                "TRAIN.INIT_CLASSES / train.init_classes, or leave it empty"
            )

    def __call__(self, name: str, value: Tensor, own: Tensor) -> tuple[Tensor, int] | None:
        """Return ``own`` with rows of ``value`` and how many these are; None where nothing of it
        can be used.
        """
        if value.shape[1:] != own.shape[1:] or value.ndim == 0:
            return None
        count = min(len(value), len(own))
        if name in self._queries:
            pairs = [(row, row) for row in range(count)]
        else:
            pairs = self._of_classes(len(value), len(own))
        if not pairs:
            return None
        result = own.detach().clone()
        sources, targets = zip(*pairs)
        result[list(targets)] = value[list(sources)].to(result)
        return result, len(pairs)

    def _of_classes(self, rows: int, own_rows: int) -> list[tuple[int, int]]:
        before, after = self._counts
        if not self.pairs:
            return []
        if (rows, own_rows) == (before, after):
            return self.pairs
        if (rows, own_rows) == (before + 1, after + 1):
            return [*self.pairs, (before, after)]
        if (rows, own_rows) == (4 * before, 4 * after):
            return [(4 * old + k, 4 * new + k) for old, new in self.pairs for k in range(4)]
        return []


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
