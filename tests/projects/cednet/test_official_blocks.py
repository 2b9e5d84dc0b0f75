"""Blocks, encoders and decoders against recorded outputs of the official code."""

import pytest
import torch

from cednet import blocks as b
from cednet.official_names import part_names
from cednet.stages import BlockSequence, Decoder, Encoder
from tests.projects.cednet import golden

DIMS = (32, 48, 64)


def swin(channels, shift, quirk=False, long_range=False):
    family = b.SwinFamily(roll_back_unshifted=quirk)
    make = family.lr_block if long_range else family.block
    return make(channels, level=5, index=int(shift), drop_path=0.0)


def cswin(channels, stripe):
    family = b.CSwinFamily(stripes=(stripe,) * 4)
    return family.block(channels, level=2, index=0, drop_path=0.0)


def next_blocks(width, count):
    return BlockSequence(b.NextBlock(width) for _ in range(count))


def decoder(**parts):
    return Decoder(widths=DIMS, norm="LN", **parts)


def refined():
    return [next_blocks(DIMS[1], 2), next_blocks(DIMS[0], 1)]


def encoder(takes_pyramid):
    levels = [next_blocks(DIMS[0], 1), next_blocks(DIMS[1], 2)]
    levels.append(BlockSequence([b.LRNextBlock(DIMS[2])]))
    return Encoder(levels=levels, widths=DIMS, norm="LN", takes_pyramid=takes_pyramid)


CASES = {
    "next": lambda: b.NextBlock(64),
    "dnext": lambda: b.LRNextBlock(64),
    "bottleneck": lambda: b.BottleneckBlock(48),
    "dbottleneck": lambda: b.LRBottleneckBlock(48),
    "swin_det_noshift": lambda: swin(64, False),
    "swin_det_shift": lambda: swin(64, True),
    "dswin_det_noshift": lambda: swin(64, False, long_range=True),
    "dswin_det_shift": lambda: swin(64, True, long_range=True),
    "swin_cls_shift_14": lambda: swin(64, True, quirk=True),
    "swin_cls_shift_7": lambda: swin(64, True, quirk=True),
    "dswin_cls_shift_7": lambda: swin(64, True, quirk=True, long_range=True),
    "cswin_h2_s1": lambda: cswin(64, 1),
    "cswin_h4_s2": lambda: cswin(128, 2),
    "cswin_h4_s7": lambda: cswin(128, 7),
    "cswin_full": lambda: b.CSwinFamily().lr_block(96, level=5, index=0, drop_path=0.0),
    "decoder_fpnstyle": decoder,
    "decoder_unet": lambda: decoder(after=refined()),
    "decoder_hourglass": lambda: decoder(
        before=[b.NextBlock(DIMS[1]), b.NextBlock(DIMS[0])], after=refined()
    ),
    "decoder_fpnvariant": lambda: decoder(
        smooth=[b.ConvNormAct(w, w, 3, norm="LN", activation="none") for w in DIMS]
    ),
    "encoder_single": lambda: encoder(False),
    "encoder_fpnvariant_multi": lambda: encoder(True),
}


@pytest.fixture(scope="module")
def recording():
    path = golden.GOLDEN / "blocks.npz"
    if not path.is_file():
        pytest.skip(f"no recorded outputs in {path.parent}")
    return golden.Recording(path)


def outputs_of(module, inputs):
    if isinstance(module, Encoder) and module.takes_pyramid:
        return module(inputs[0], (inputs[1], inputs[2]))
    outputs = module(*inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def load(module, keys):
    """Fill a part by the rule, and check that names and shapes are the official ones."""
    names = part_names(module)
    own = module.state_dict()
    expected = {k: tuple(shape) for k, shape in keys if not k.endswith("position_index")}
    assert {names[k]: tuple(v.shape) for k, v in own.items()} == expected
    weights = golden.filled([(k, shape, "float32") for k, shape in keys if k in expected])
    module.load_state_dict(
        {k: own[k] if k.endswith("num_batches_tracked") else weights[names[k]] for k in own}
    )
    return module.eval()


@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_official_code(recording, name):
    case = recording.meta["blocks"][name]
    module = load(CASES[name](), case["keys"])
    inputs = [
        golden.image(case["input_seed"] + j, *shape) for j, shape in enumerate(case["input_shapes"])
    ]
    with torch.no_grad():
        outputs = outputs_of(module, inputs)
        # the same in the memory order that the network uses
        ordered = outputs_of(
            module, [x.contiguous(memory_format=torch.channels_last) for x in inputs]
        )
    for values in (outputs, ordered):
        recording.assert_equal(**{f"{name}__out{i}": value for i, value in enumerate(values)})


def test_every_recorded_case_is_checked(recording):
    assert set(recording.meta["blocks"]) == set(CASES)


@pytest.mark.parametrize("name", ["swin_det_shift", "swin_cls_shift_7"])
def test_the_quirk_matters_where_it_should(recording, name):
    """Each of the two behaviours fails the other's case, so neither test is empty."""
    case = recording.meta["blocks"][name]
    quirk = name == "swin_det_shift"
    module = load(swin(64, True, quirk=quirk), case["keys"])
    shape = case["input_shapes"][0]
    with torch.no_grad():
        out = module(golden.image(case["input_seed"], *shape))
    error = recording.error(f"{name}__out0", out)
    # at 10 x 13 both shift; only maps as low as a window differ
    assert error > 0.1 if not quirk else error < golden.TOLERANCE
