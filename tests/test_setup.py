"""Set-up: detectron2 from the pinned wheel, one-line errors, a plain install that is complete."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from d2dense import install_detectron2 as installer


@pytest.fixture
def carrier(tmp_path, monkeypatch):
    """A stand-in for the pinned wheel, whose checksum is the expected one."""
    path = tmp_path / "labgym-3.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(
            "LabGym/detectron2/__init__.py", "from .utils import x\n__version__ = '0.6'\n"
        )
        wheel.writestr("LabGym/detectron2/utils.py", "import LabGym.detectron2.other as x\n")
        wheel.writestr("LabGym/detectron2/other.py", "")
        wheel.writestr("LabGym/gui.py", "raise SystemExit")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(installer, "CARRIER_SHA256", digest)
    return path


def test_wheel_holds_detectron2_alone_under_its_own_name(carrier, tmp_path):
    wheel = installer.build_wheel(carrier, tmp_path / "out")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        assert all(name.startswith("detectron2") for name in names)
        assert file.read("detectron2/utils.py") == b"import detectron2.other as x\n"
    done = subprocess.run(
        [sys.executable, "-c", "import detectron2; print(detectron2.__version__)"],
        env={**os.environ, "PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "0.6"


def test_same_carrier_gives_the_same_wheel(carrier, tmp_path):
    first = installer.build_wheel(carrier, tmp_path / "a").read_bytes()
    assert first == installer.build_wheel(carrier, tmp_path / "b").read_bytes()


def test_wrong_checksum_is_one_line(carrier, tmp_path, capsys):
    carrier.write_bytes(carrier.read_bytes() + b"x")
    argv = ["--carrier", str(carrier), "--wheel-dir", str(tmp_path / "out")]
    assert installer.main(argv) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "sha256" in message
    assert "download" in message
    assert not (tmp_path / "out").exists()


def test_missing_network_is_one_line(tmp_path, capsys, monkeypatch):
    for key in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert installer.main(["--wheel-dir", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "--carrier" in message


def test_an_importable_detectron2_is_kept(capsys):
    assert installer.main([]) == 0
    assert "kept" in capsys.readouterr().out


def test_plain_install_has_packages_and_configs(repo_root, tmp_path):
    """The built wheel alone, outside the checkout, knows its models and builds one."""
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(".git", ".venv", "build", "output", "datasets", "*.egg-info")
    shutil.copytree(repo_root, source, ignore=ignore)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(tmp_path), str(source)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("d2dense-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    shutil.rmtree(source)
    code = (
        "import d2dense, fscascade; print(d2dense.__file__); print(fscascade.__file__)\n"
        "model = d2dense.model_zoo.get_model('FSCascade/fscascade_r50_fpn_1x')\n"
        "print(sum(p.numel() for p in model.parameters()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, second, count = done.stdout.split()
    assert first.startswith(str(site))
    assert second.startswith(str(site))
    assert int(count) == 71_971_790
