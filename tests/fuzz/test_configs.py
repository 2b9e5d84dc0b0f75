"""Config files and overrides of both kinds: loaded, built, saved and loaded again, or refused."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import pytest
import yaml
from hypothesis import strategies as st

from d2dense import config, model_zoo
from d2dense.data import datasets
from tests.fuzz.harness import attempt, fuzz
from tests.fuzz.mutations import damaged_bytes, nasty_values, spoiled
from tests.tools import tiny_detector  # noqa: F401  registers a model of a few parameters

TINY = "FSCascade/fscascade_tiny_shapes"
YACS = {
    "MODEL": {
        "META_ARCHITECTURE": "TinyDetector", "DEVICE": "cpu", "ROI_HEADS": {"NUM_CLASSES": 3},
        "RESNETS": {"DEPTH": 10, "RES2_OUT_CHANNELS": 32}, "PIXEL_MEAN": [1.0, 2.0, 3.0],
    },
    "DATASETS": {"TRAIN": ["a"], "CUSTOM": {"TRAIN": {"JSON": "a.json", "IMAGES": "b"}}},
    "INPUT": {"MIN_SIZE_TRAIN": [32, 64], "CROP": {"ENABLED": True, "SIZE": [0.5, 0.5]}},
    "SOLVER": {"BASE_LR": 0.1, "STEPS": [1, 2], "MAX_ITER": 4},
    "OUTPUT_DIR": "out",
    "VERSION": 2,
}  # fmt: skip
LAZY = {
    "model": {
        "_target_": "torch.nn.Sequential",
        "unused": {"_target_": "d2dense.config.lazy.named", "name": "torch.nn.ReLU"},
    },
    "size": 8,
    "train": {"max_iter": 3, "device": "cpu", "output_dir": "out", "amp": {"enabled": False}},
    "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1, "params": [1, "${train.max_iter}"]},
    "datasets": {"train": {"json": "a.json"}},
    "dataloader": {"train": {"_target_": "d2dense.data.build_train_loader", "names": ["a"]}},
}
LINEAR = {
    "model": {"_target_": "torch.nn.Linear", "in_features": 4, "out_features": "${size}"},
    "size": 8,
    "train": {"device": "cpu"},
}


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def _calls(canary) -> list:
    """Values that run a command when they are built or read."""
    command = canary.command
    targets = [
        "os.system", "posix.system", "subprocess.getoutput", "builtins.eval", "builtins.exec",
        "d2dense.errors.os.system", "torch.nn.functional.torch.os.system", "torch.os.system",
        "detectron2.utils.env.os.system", "d2dense.data.datasets.os.system", "__main__.os.system",
        "d2dense.config.lazy.locate", "d2dense.config.lazy.copy.os.system", "torch.hub.os.system",
        "d2dense.data.child.call_in_child", "timm.models.os.system", "fscascade.os.system",
        "torch.nn.Module.__init__.__globals__.get", "torch.nn.modules.module.os.system",
    ]  # fmt: skip
    calls = [{"_target_": name, "command": command} for name in targets]
    calls += [
        {"_target_": "builtins.eval", "source": f"__import__('os').system('{command}')"},
        {"_target_": {"_target_": "d2dense.config.lazy.named", "name": "os.system"}},
        {"_target_": {"_target_": "d2dense.config.lazy.locate", "name": "os.system"},
         "command": command},
        {"_target_": "d2dense.config.lazy.named", "name": "os.system"},
        {"_target_": "d2dense.data.child.call_in_child",
         "function": {"_target_": "d2dense.config.lazy.named", "name": "os.abort"}},
        {"_target_": "${train.device}", "command": command},
        {"_target_": "torch.nn.${x}", "command": command},
        "${oc.create:{_target_:os.system,command:'" + command + "'}}",
        "${oc.decode:'{_target_: os.system, command: " + command + "}'}",
        ["os.system", command],
    ]  # fmt: skip
    return calls


TAGS = [
    "!!python/object/apply:os.system ['touch {0}']",
    "!!python/object/apply:subprocess.check_output [['touch', '{0}']]",
    "!!python/object/new:os.system ['touch {0}']",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object/apply:eval [\"__import__('os').system('touch {0}')\"]",
    "!!python/tuple [1, 2]",
    "!!binary aGFsbG8=",
    "!!binary x",
    "!!int x",
    "!!int ''",
    "!!float x",
    "!!bool x",
    "!!timestamp x",
    "!!set {{a, b}}",
    "!!omap [a: 1]",
    "2001-13-45",
    "2001-01-01",
    "0x_",
    "1:99:99",
    "*nowhere",
    "&a [*a]",
    "&a {{x: *a}}",
    '"\\ud800"',
    "- - - -",
    "{{? [1]: 2}}",
    "{{[]: 1}}",
    "? a\n? b",
    "${{",
    "${{a",
    "\t- x",
    "'open",
    "<<: 1",
    "[" * 2000,
    "- " * 500,
    "{{a: " * 400,
]


def _bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for n in range(1, levels):
        lines.append(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]")
    return "\n".join(lines)


def _trees(canary):
    calls = _calls(canary)
    classes = ["torch.nn.Linear", "torch.nn.Identity", "torch.nn.functional.relu", "torch.nn"]
    extra = [*calls, *classes, {"_target_": "torch.nn.Identity"}, "${model}", "${train}", "${size}"]
    bases = [YACS, YACS, LAZY, LINEAR]
    return st.one_of(*(spoiled(base, extra=extra, most=3) for base in bases))


def _dumped(tree) -> bytes:
    """The tree as yaml (json where yaml's writer cannot), which both front ends read."""
    try:
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
        return text.encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError, RecursionError):
        return json.dumps(tree, default=str).encode("utf-8", "surrogatepass")


@st.composite
def _with_tag(draw, canary) -> bytes:
    """A valid file with a hostile piece of yaml as one of its values, or before or after it."""
    tag = draw(st.sampled_from(TAGS)).format(canary.path)
    lines = yaml.safe_dump(draw(st.sampled_from([YACS, LAZY, LINEAR])), sort_keys=False).split("\n")
    index = draw(st.integers(0, len(lines) - 1))
    name, colon, _ = lines[index].partition(":")
    way = draw(st.sampled_from(["value", "before", "after", "alone", "bomb", "twice", "bom"]))
    if way == "value":
        lines[index] = f"{name}{colon} {tag}"
    elif way == "before":
        lines.insert(index, tag)
    elif way == "after":
        lines.append(f"extra: {tag}")
    elif way == "alone":
        lines = [tag]
    elif way == "bomb":
        lines = [*_bomb(draw(st.integers(2, 40))).split("\n"), *lines]
    elif way == "twice":
        lines.insert(index, lines[index])
    else:
        lines[0] = "\ufeff" + lines[0]
    return "\n".join(lines).encode()


def _files(canary):
    samples = [_dumped(each) for each in (YACS, LAZY, LINEAR)]
    tokens = [
        b"_target_: os.system",
        b"!!python/name:os.system",
        b"\t",
        b": ",
        b"- ",
        b"&a ",
        b"*a",
    ]
    return _trees(canary).map(_dumped) | _with_tag(canary) | damaged_bytes(samples, tokens=tokens)


def _open(path: Path, overrides=()) -> None:
    """Load, build, save and load again."""
    cfg = attempt(lambda: config.load(path, overrides))
    if cfg is None:
        return
    attempt(lambda: config.build_model(cfg, device="cpu"))
    attempt(lambda: config.build_model(cfg))
    slots = cfg.get("datasets") if config.kind_of(cfg) == "lazy" else cfg.DATASETS.CUSTOM
    if slots is not None:
        attempt(lambda: datasets.register_custom(slots))
    text = attempt(lambda: config.dump(cfg))
    if text is None:
        return
    again = path.with_name("again.yaml")
    if attempt(lambda: config.save(cfg, again) or True):
        reloaded = attempt(lambda: config.load(again))
        # what was read from yaml can be written and read again; an override may be anything
        if not overrides:
            assert reloaded is not None, f"{text!r} was saved, but cannot be loaded"
            assert config.dump(reloaded) == text


def test_config_files_of_both_kinds(profile, canary, tmp_path):
    path = tmp_path / "config.yaml"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        _open(path)

    fuzz(profile, _files(canary), read, name="config files", canary=canary, quick=80, factor=12)


def test_python_configs_with_damaged_bytes(profile, tmp_path):
    """Such a file is code; what it raises is the user's to see in one line."""
    path = tmp_path / "config.py"
    source = b"from d2dense.config import common\nmodel = {'a': 1}\ntrain = common.train(seed=1)\n"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        attempt(lambda: config.load(path))

    tokens = [b"1/0", b"raise KeyError", b"import nothing", b"\n  x", b"from . import a", b"\xff"]
    fuzz(
        profile,
        damaged_bytes([source], most=3, tokens=tokens),
        read,
        name="python configs",
        factor=20,
    )


def _override_items(canary, keys):
    """Pieces of a command line: keys and values of all sorts, in both spellings."""
    texts = [json.dumps(call) for call in _calls(canary)] + [repr(c) for c in _calls(canary)]
    texts += ["os.system", "1", "0.1", "[1,2]", "(1,)", "null", "auto", "${train}", "${nothing}"]
    texts += ["${oc.env:HOME}", "'", '"', "{", "[" * 300, "(" * 300, "0x" + "f" * 5000, "9" * 5000]
    texts += [_bomb(30), "!!python/name:os.system", "1e999", "nan", "{[]: 1}", "{1: 2}", "b'x'"]
    texts += [
        "2001-13-45",
        "\x00",
        "\udcff",
        "\n",
        "=",
        "",
        " ",
        "-" * 50,
        "x" * 3000,
        "1j",
        "{1,2}",
    ]
    values = st.sampled_from(texts) | st.text(max_size=12) | nasty_values().map(str)
    odd = ["", ".", "..", "a", "model.", ".model", "model..x", "model[0]", "_target_", "x y", "\n"]
    odd += [
        "datasets.a.b",
        "datasets..b",
        "datasets.a[0",
        "DATASETS.CUSTOM.X.Y",
        "a" * 3000,
        "${x}",
    ]
    names = st.sampled_from(keys) | st.sampled_from(odd) | st.text(max_size=8)
    names |= st.sampled_from(keys).map(lambda key: f"{key}._target_")
    together = st.tuples(names, values).map(lambda pair: [f"{pair[0]}={pair[1]}"])
    apart = st.tuples(names, values).map(list)
    lists = st.lists(together | apart, min_size=1, max_size=3)
    return lists.map(lambda parts: [word for part in parts for word in part])


YACS_KEYS = [
    "MODEL", "MODEL.DEVICE", "MODEL.ROI_HEADS.NUM_CLASSES", "model.roi_heads.num_classes", "SEED",
    "MODEL.WEIGHTS", "DATASETS.TRAIN", "DATASETS.CUSTOM", "DATASETS.CUSTOM.TRAIN",
    "DATASETS.CUSTOM.TRAIN.JSON", "DATASETS.CUSTOM.VAL.X.Y", "SOLVER.BASE_LR", "SOLVER.MAX_ITER",
    "SOLVER.AMP.ENABLED", "SOLVER.STEPS", "INPUT.CROP.SIZE", "OUTPUT_DIR", "MODEL.DEVICE.X",
    "MODEL.META_ARCHITECTURE", "MODEL.PIXEL_MEAN",
]  # fmt: skip
LAZY_KEYS = [
    "model", "model._target_", "model.in_features", "model.bias", "model.unused.name", "size",
    "model.unused._target_", "model.nothing", "train", "train.device", "train.max_iter",
    "optimizer.lr", "optimizer.params", "optimizer.params.0", "optimizer.params.9", "datasets",
    "datasets.train", "datasets.train.json", "datasets.val", "train.amp.enabled",
    "dataloader.train.names",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["yaml", "lazy"])
def test_overrides(profile, canary, tmp_path, kind):
    path = tmp_path / "config.yaml"
    both = {"yaml": [YACS], "lazy": [LAZY, LINEAR]}[kind]
    keys = {"yaml": YACS_KEYS, "lazy": LAZY_KEYS}[kind]

    def read(case) -> None:
        tree, items = case
        path.write_bytes(_dumped(tree))
        _open(path, items)

    cases = st.tuples(st.sampled_from(both), _override_items(canary, keys))
    fuzz(
        profile,
        cases,
        read,
        name=f"overrides of {kind} configs",
        canary=canary,
        quick=80,
        factor=8,
    )


@pytest.mark.parametrize("kind", ["yaml", "lazy"])
def test_the_tiny_model_with_other_values(profile, canary, tmp_path, kind):
    """Values of every key that building a real model reads, changed one or two at a time."""
    original = config.dump(model_zoo.get_config(TINY, kind))
    tree = yaml.safe_load(original)
    name = "MODEL" if kind == "yaml" else "model"
    other = {key: value for key, value in tree.items() if key != name}
    path = tmp_path / "config.yaml"
    # sizes that a machine may try to allocate say nothing about messages
    small = st.sampled_from(
        [None, True, 0, 1, -1, 3, 0.5, "", "x", "auto", [], [1], [[]], {}, {"a": 1}, 2**62, "${x}"]
        + _calls(canary)
    )

    @st.composite
    def trees(draw):
        model = copy.deepcopy(tree[name])
        for _ in range(draw(st.integers(1, 2))):
            node = model
            while True:
                key = draw(
                    st.sampled_from(list(node) if isinstance(node, dict) else range(len(node)))
                )
                if (
                    not isinstance(node[key], (dict, list))
                    or not node[key]
                    or draw(st.integers(0, 9)) == 0
                ):
                    break
                node = node[key]
            node[key] = draw(small)
            if not model:
                break
        return {name: model, **other}

    def read(case) -> None:
        path.write_bytes(_dumped(case))
        cfg = attempt(lambda: config.load(path))
        if cfg is not None:
            attempt(lambda: config.build_model(cfg, device="cpu"))

    fuzz(
        profile,
        trees(),
        read,
        name=f"the tiny model's {kind} config: load, build",
        canary=canary,
        quick=20,
        factor=8,
    )


def test_files_of_other_sorts_and_bases(profile, tmp_path):
    """Chains of _BASE_, folders, missing files, other endings."""
    for each in ("folder.yaml", "deep"):
        (tmp_path / each).mkdir()
    names = ["a.yaml", "b.yaml", "c.yaml", "deep/d.yaml"]
    others = [
        "../x.yaml",
        "/nonexistent.yaml",
        "folder.yaml",
        "~/x",
        "",
        "\x00",
        "https://x/y",
        "x" * 5000,
    ]
    bases = st.sampled_from([*names, *others]) | nasty_values()
    contents = st.dictionaries(
        st.sampled_from(names),
        st.fixed_dictionaries(
            {}, optional={"_BASE_": bases | st.lists(bases, max_size=3), "SEED": nasty_values()}
        ),
    )

    def read(case) -> None:
        files, opened = case
        for name in names:
            (tmp_path / name).unlink(missing_ok=True)
        for name, tree in files.items():
            (tmp_path / name).write_bytes(_dumped(tree))
        attempt(lambda: config.load(opened if opened in others else tmp_path / opened))

    cases = st.tuples(contents, st.sampled_from([*names, *others]))
    fuzz(profile, cases, read, name="_BASE_ and other files", factor=25)


def test_dataset_slots(profile, tmp_path):
    """Entries of DATASETS.CUSTOM and datasets, registered and loaded."""
    keys = ["json", "images", "labels", "classes", "kind", "ignore_label", "task", "image_suffix"]
    keys += ["label_suffix", "JSON", "other"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "names.txt").write_bytes(b"a\nb\xff\n")
    (tmp_path / "names.json").write_text('{"classes": ["a"], "ignore_label": 1e400}')
    good = ["coco", "lvis", "cityscapes", "sem_seg", "semantic", str(tmp_path), ["a", "b"]]
    good += [str(tmp_path / each) for each in ("folder", "names.txt", "names.json", "none")]
    entries = st.dictionaries(
        st.sampled_from(keys) | nasty_values().filter(_hashable),
        st.sampled_from(good) | nasty_values(),
        max_size=6,
    )
    names = st.sampled_from(["train", "VAL"]) | nasty_values().filter(_hashable)
    slots = st.dictionaries(names, entries | nasty_values(), min_size=1, max_size=2)

    def read(case) -> None:
        registered = attempt(lambda: datasets.register_custom(case))
        for name in (registered or {}).values():
            attempt(lambda name=name: datasets.load(name))

    fuzz(profile, slots | nasty_values(), read, name="dataset slots", factor=25)


def _hashable(value) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
