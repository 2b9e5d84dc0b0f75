"""Provide ``detectron2`` without a compiler.

detectron2 is not on the package index. A pure-Python copy of version 0.6 (Apache-2.0) travels
inside the LabGym wheel as ``LabGym/detectron2``; this module downloads that wheel (pinned,
checksummed), restores the import prefix, packs the result as ``detectron2-0.6+pure`` and installs
it. An importable detectron2 is kept.

Only the standard library is used: this file runs before anything else is installed, as a script
from a checkout or as ``python -m d2dense.install_detectron2`` after ``pip install``.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

__all__ = ["InstallError", "build_wheel", "download_carrier", "installed_version", "main"]

CARRIER = "LabGym==3.1.2"
CARRIER_SHA256 = "a2900cff8a3fb508e1975f19b5f9abd9f261966db87b0c332697fb4138c1cb2b"
CARRIER_PREFIX = "LabGym/detectron2/"
WHEEL_NAME = "detectron2-0.6+pure-py3-none-any.whl"
# The parts of detectron2's own requirement list that its library code imports (black is only for
# to_py()).
REQUIRES = (
    "Pillow",
    "matplotlib",
    "pycocotools",
    "termcolor",
    "yacs",
    "tabulate",
    "cloudpickle",
    "tqdm",
    "tensorboard",
    "fvcore<0.1.6",
    "iopath<0.1.10",
    "omegaconf<2.4,>=2.1",
    "hydra-core>=1.1",
    "packaging",
)


class InstallError(RuntimeError):
    """A download, checksum or installation problem; the message is one line saying what to do."""


def installed_version(python: str = sys.executable) -> str | None:
    """Return the version of the detectron2 that ``python`` imports, or None if it imports none."""
    # -I keeps this folder and PYTHONPATH (as set by an isolated build) from standing in for the
    # real site-packages.
    code = "import detectron2; print(detectron2.__version__)"
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def download_carrier(folder: Path) -> Path:
    """Download the carrier wheel into ``folder`` with pip and return its path."""
    command = [
        sys.executable,
        "-I",
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
    ]
    # The carrier declares Python < 3.11; its detectron2 part runs on 3.10 to 3.13.
    command += [
        "--no-deps",
        "--only-binary=:all:",
        "--python-version",
        "3.10",
        "-d",
        str(folder),
        CARRIER,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise InstallError(
            f"could not download {CARRIER} ({reason}); connect to a package index, or fetch that "
            "wheel elsewhere and run 'python -m d2dense.install_detectron2 --carrier FILE', or use "
            "'make detectron2-official'"
        )
    return wheels[0]


def _check(carrier: Path) -> None:
    try:
        found = hashlib.sha256(carrier.read_bytes()).hexdigest()
    except OSError as error:
        raise InstallError(
            f"cannot read {carrier}: {error.strerror}; pass an existing {CARRIER} wheel"
        ) from None
    if found != CARRIER_SHA256:
        raise InstallError(
            f"{carrier.name} has sha256 {found}, expected {CARRIER_SHA256}; delete it and download "
            f"{CARRIER} again"
        )


def _record_line(name: str, data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}"


def build_wheel(carrier: Path, folder: Path) -> Path:
    """Write the detectron2 wheel made from ``carrier`` into ``folder`` and return its path.

    Raises:
        InstallError: the carrier is missing or its checksum differs from the pinned one.
    """
    _check(carrier)
    info = "detectron2-0.6+pure.dist-info"
    files: dict[str, bytes] = {}
    with zipfile.ZipFile(carrier) as source:
        for name in source.namelist():
            if name.startswith(CARRIER_PREFIX) and not name.endswith("/"):
                data = source.read(name)
                if name.endswith((".py", ".yaml")):
                    data = data.replace(b"LabGym.detectron2", b"detectron2")
                files["detectron2/" + name[len(CARRIER_PREFIX) :]] = data
    requires = "".join(f"Requires-Dist: {item}\n" for item in REQUIRES)
    files[f"{info}/METADATA"] = (
        "Metadata-Version: 2.1\nName: detectron2\nVersion: 0.6+pure\nLicense: Apache-2.0\n"
        "Summary: detectron2 0.6 without compiled operators, unpacked from LabGym 3.1.2\n"
        f"Requires-Python: >=3.10\n{requires}"
    ).encode()
    files[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: d2dense\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    record = [_record_line(name, data) for name, data in files.items()] + [f"{info}/RECORD,,"]
    files[f"{info}/RECORD"] = ("\n".join(record) + "\n").encode()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / WHEEL_NAME
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in files.items():
            # A fixed time stamp makes the wheel the same file on every machine.
            wheel.writestr(zipfile.ZipInfo(name, (2022, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
    return target


def local_requirement(folder: Path) -> list[str]:
    """Return a pip requirement on a detectron2 wheel built into ``folder``, or [] where it is not
    needed or possible.

    Used by setup.py, so that ``pip install .`` into an empty environment is complete.
    """
    if installed_version() is not None:
        return []
    wheel = folder / WHEEL_NAME
    try:
        if not wheel.is_file():
            with tempfile.TemporaryDirectory() as scratch:
                build_wheel(download_carrier(Path(scratch)), folder)
    except InstallError as error:
        print(f"warning: detectron2 is left out: {error}", file=sys.stderr)
        return []
    return [f"detectron2 @ {wheel.resolve().as_uri()}"]


def _install(wheel: Path, constraints: Path | None) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        str(wheel),
    ]
    if constraints is not None:
        command += ["-c", str(constraints)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise InstallError(
            f"pip could not install {wheel.name} ({reason}); check the network and run this again"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--carrier", type=Path, help=f"use this local {CARRIER} wheel instead of downloading it"
    )
    parser.add_argument(
        "--wheel-dir", type=Path, help="only build the detectron2 wheel into this folder"
    )
    parser.add_argument(
        "--constraints", type=Path, help="pip constraints file for detectron2's own requirements"
    )
    args = parser.parse_args(argv)
    version = installed_version()
    if version is not None and args.wheel_dir is None:
        print(f"detectron2 {version} is already importable: kept")
        return 0
    try:
        with tempfile.TemporaryDirectory() as scratch:
            carrier = args.carrier or download_carrier(Path(scratch))
            wheel = build_wheel(carrier, args.wheel_dir or Path(scratch) / "wheel")
            if args.wheel_dir is not None:
                print(wheel)
                return 0
            _install(wheel, args.constraints)
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"detectron2 {installed_version()} installed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
