"""What only a GPU can show: few host syncs per step, and float16 with loss scaling."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from d2dense import checkpoint
from d2dense.engine.trainer import Trainer
from tests.engine.fakes import FakeExperiment, TinyModel, make_batches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(batches):
    # kept on the device: moving data there is the model's affair, and would count as syncs
    move = {"image", "target"}
    return [
        [{k: v.cuda() if k in move else v for k, v in each.items()} for each in batch]
        for batch in batches
    ]


def syncs_of_a_run(folder, **settings):
    experiment = FakeExperiment(
        folder,
        device="cuda",
        batches=on_gpu(make_batches(4, 4)),
        test_names=(),
        max_iter=40,
        log_period=20,
        checkpoint_period=1000,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
        **settings,
    )
    trainer = Trainer(experiment)
    trainer.save = lambda *args, **kwargs: None  # a checkpoint copies every tensor to the host
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.train()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"amp_enabled": True, "amp_dtype": "bfloat16", "ema_enabled": True},
        {"amp_enabled": True, "amp_dtype": "float16"},
        {"clip_enabled": True, "clip_type": "full_model", "accumulation_steps": 2},
        {"clip_enabled": True, "clip_type": "norm"},
    ],
)
def test_host_syncs_come_with_the_reports_only(tmp_path, settings):
    # two reports in 40 steps; a sync per step or per loss would be 40 and more
    assert syncs_of_a_run(tmp_path, **settings) <= 4


def test_float16_scales_the_loss_and_trains(tmp_path):
    experiment = FakeExperiment(
        tmp_path,
        device="cuda",
        batches=make_batches(1, 4),
        amp_enabled=True,
        amp_dtype="float16",
        max_iter=60,
        log_period=1,
        test_names=(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
    )
    trainer = Trainer(experiment)
    seen = []
    trainer.model.head.register_forward_hook(lambda m, i, output: seen.append(output.dtype))
    trainer.train()
    assert set(seen) == {torch.float16}
    history = [value for value, _ in trainer.storage.history("total_loss").values()]
    assert history[-1] < 0.5 * history[0]
    scaler = checkpoint.read(tmp_path / "model_final.pth")["scaler"]
    assert scaler["scale"] > 1


def test_a_constant_loss_may_be_on_the_cpu(tmp_path):
    class Constant(TinyModel):
        def forward(self, batch):
            losses = super().forward(batch)
            return losses | {"loss_none": torch.tensor(0.5)} if self.training else losses

    experiment = FakeExperiment(tmp_path, device="cuda", test_names=(), max_iter=3)
    experiment.build_model = lambda: Constant().cuda()
    Trainer(experiment).train()
    (row,) = (json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines())
    assert row["loss_none"] == 0.5
