"""GPU report: run everything that needs an NVIDIA GPU and write one JSON file (`make gpu-report`).

Steps, the most wanted first: `eps-doctor`; the benchmarks that have `--device`, training and
deployment before others; the chain from training to a bundle with TensorRT in every precision and
with ONNX Runtime on CUDA; all tests that need a GPU. The file has results, reports, times, and the
output of failed steps, and is written after each step. With `--minutes M`, the step that runs after
M minutes is ended, its output so far is kept, and the rest is not run. Exit codes: 0 all steps
passed, 1 no GPU (nothing was run), 3 a step failed or was not run (the file is still written).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from eps_core import machine
from eps_core.files import replace_file

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[1]
_TAIL = 200  # lines of output per step that the report keeps
_DEVICE = "--device"
_FIRST = ("training", "deploy")  # of the benchmarks
MINUTES = 60.0


@dataclass(frozen=True, slots=True)
class Step:
    """One command of the report.

    Attributes:
        name: key in the report.
        command: program and arguments.
        folder: working directory.
        result: JSON or JUnit XML file that it writes; None: the last line of its output, if JSON.
        allowed: exit codes that do not mean a failure of the machine.
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    result: Path | None = None
    allowed: tuple[int, ...] = (0,)


def main(minutes: float = MINUTES) -> int:
    deadline = time.monotonic() + 60 * minutes
    gpus = machine.gpus()
    if not gpus:
        say("gpu-report: nvidia-smi lists no NVIDIA GPU here; nothing was run")
        return 1
    target = Path(f"gpu-report-{time.strftime('%Y%m%d-%H%M%S')}.json")
    report: dict[str, Any] = {"schema": SCHEMA, "gpus": [asdict(gpu) for gpu in gpus], "steps": {}}
    with tempfile.TemporaryDirectory() as folder:
        for step in steps(Path(folder)):
            report["steps"][step.name] = run(step, deadline)
            # After each step, so that a crash of the machine loses one step only.
            replace_file(target, json.dumps(report, indent=1).encode())
    failed = [name for name, told in report["steps"].items() if not told["passed"]]
    say(f"\n{len(report['steps'])} steps, failed: {', '.join(failed) or 'none'}")
    say(f"Report: {target} (please send it back whatever it says)")
    return 3 if failed else 0


def steps(folder: Path) -> Iterator[Step]:
    """Yield all steps in order; each runs before the next one is created."""
    python = sys.executable
    tests = folder / "tests.xml"
    yield Step("doctor", (script("eps-doctor"), "--json"), folder)
    found = {path.stem: path for path in sorted((ROOT / "benchmarks").glob("[!_]*.py"))}
    for name in dict.fromkeys((*_FIRST, *found)):
        if takes_device(found[name]):
            yield Step(name, (python, str(found[name]), _DEVICE, "cuda"), ROOT)
    yield from chain(folder)
    yield Step(
        "tests",
        (python, "-m", "pytest", "-m", "gpu", "-rs", "--timeout", "1800", f"--junitxml={tests}"),
        ROOT,
        tests,
    )


def chain(folder: Path) -> Iterator[Step]:
    """Yield the steps from digits, trained on the GPU, to a bundle per engine and precision."""
    train = (script("eps-train"), "--with-baseline", _DEVICE, "cuda")
    yield Step("train", train, folder)
    yield Step("compact", (script("eps-compact"), "ckpt.pt"), folder)
    for name, options in {
        "trt-fp32": ("trt", "--fp32"),
        "trt-tf32": ("trt", "--tf32"),
        "trt-fp16": ("trt", "--fp16"),
        "trt-bf16": ("trt", "--bf16"),
        "trt-int8": ("trt", "--int8"),
        "ort-cuda-fp32": ("ort", "--fp32", "--provider", "cuda"),
        "ort-cuda-fp16": ("ort", "--fp16", "--provider", "cuda"),
    }.items():
        bundle = folder / name
        command = (script("eps-deploy"), "--engine", *options, "-o", str(bundle))
        # 3: a check failed, which is a result about the network and not about the machine.
        yield Step(f"deploy-{name}", command, folder, bundle / "report.json", allowed=(0, 3))


def script(name: str) -> str:
    """Path of a console script in the environment of this process."""
    return str(Path(sys.executable).parent / name)


def takes_device(path: Path) -> bool:
    """Whether a benchmark has the option `--device`."""
    asked = subprocess.run(
        [sys.executable, str(path), "--help"], capture_output=True, text=True, check=False
    )
    return _DEVICE in asked.stdout


def run(step: Step, deadline: float) -> dict[str, Any]:
    """Run `step`, show its output, and return its entry in the report.

    `deadline`, of `time.monotonic`, ends it.
    """
    say(f"\n$ {' '.join(step.command)}")
    began = time.monotonic()
    if began >= deadline:
        printed, code = ["not run: the time limit was reached (--minutes)"], None
        say(printed[0])
    else:
        printed, code = _printed(step, deadline - began)
    result = _result(step, printed)
    return {
        "command": [Path(step.command[0]).name, *step.command[1:]],
        "exit": code,
        "passed": code in step.allowed and _answered(step, result),
        "seconds": round(time.monotonic() - began, 1),
        "result": result,
        "printed": [] if code == 0 and result is not None else printed[-_TAIL:],
    }


def _printed(step: Step, seconds: float) -> tuple[list[str], int | None]:
    """Output lines and exit code; the exit code is None if the command does not start or end."""
    lines: list[str] = []
    try:
        process = subprocess.Popen(
            step.command,
            cwd=step.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    except OSError as error:
        return [f"{step.command[0]}: {error.strerror}"], None
    late = threading.Event()

    def end() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)  # its children too

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            say(line.rstrip("\n"))
            lines.append(line.rstrip("\n"))
    timer.cancel()
    if late.is_set():
        lines.append("ended: the time limit was reached (--minutes)")
        return lines, None
    return lines, process.returncode


def _answered(step: Step, result: Any) -> bool:
    """Whether the expected result exists; a test run with all tests skipped does not count."""
    if step.result is None:
        return True
    if step.result.suffix == ".xml":
        return result is not None and result["counts"]["passed"] > 0
    return result is not None


def _result(step: Step, printed: Sequence[str]) -> Any:
    """The JSON written or printed last, or the outcome of each test; None: neither."""
    try:
        if step.result is None:
            return json.loads(printed[-1]) if printed else None
        if step.result.suffix == ".xml":
            return outcomes(step.result)
        return json.loads(step.result.read_bytes())
    except (OSError, ValueError, ElementTree.ParseError):
        return None


def outcomes(path: Path) -> dict[str, Any]:
    """Read pytest's JUnit file: the number of tests per outcome, and the messages of failures."""
    found: dict[str, list[Any]] = {"passed": [], "failed": [], "skipped": []}
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        problem = case.find("failure") if case.find("error") is None else case.find("error")
        if problem is not None:
            found["failed"].append({"test": name, "said": problem.text})
        elif (skip := case.find("skipped")) is not None:
            found["skipped"].append({"test": name, "why": skip.get("message")})
        else:
            found["passed"].append(name)
    return {"counts": {outcome: len(names) for outcome, names in found.items()}, **found}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run all that needs a GPU; write one report.")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time limit (%(default)g)")
    sys.exit(main(parser.parse_args().minutes))
