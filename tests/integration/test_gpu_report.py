"""`make gpu-report`: one file whatever happens, and nothing at all where there is no GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eps_core.machine import Gpu
from tests.meta.project import ROOT
from tests.meta.test_text import check_usage

SCRIPT = ROOT / "benchmarks" / "_gpu_report.py"
JUNIT = """<testsuites><testsuite>
<testcase classname="tests.a" name="works"/>
<testcase classname="tests.a" name="skips"><skipped message="needs two GPUs"/></testcase>
<testcase classname="tests.a" name="fails"><failure message="m">assert 1 == 2</failure></testcase>
<testcase classname="tests.a" name="breaks"><error message="m">no fixture</error></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("_gpu_report", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    loaded: Any = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "_gpu_report", loaded)  # its dataclass looks itself up
    spec.loader.exec_module(loaded)
    gpu = Gpu(index=0, name="A GPU", compute_capability="9.0", memory=2, free=1, driver="580.95.05")
    monkeypatch.setattr("eps_core.machine.gpus", lambda: (gpu,))
    monkeypatch.chdir(tmp_path)
    return loaded


def report(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("gpu-report-*.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_without_a_gpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        cwd=tmp_path,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == ("gpu-report: nvidia-smi lists no NVIDIA GPU here; nothing was run\n")
    assert not [*tmp_path.iterdir()]


def pretend(module: Any, monkeypatch: pytest.MonkeyPatch, *steps: Any) -> None:
    monkeypatch.setattr(module, "steps", lambda folder: iter(steps))


def python(module: Any, name: str, code: str, **options: Any) -> Any:
    return module.Step(name, (sys.executable, "-c", code), Path.cwd(), **options)


def test_all_went_well(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last_line = python(module, "numbers", "print('some text'); print('{\"speed\": 2}')")
    file = python(
        module,
        "file",
        "open('out.json', 'w').write('[1, 2]'); raise SystemExit(3)",
        result=tmp_path / "out.json",
        allowed=(0, 3),
    )
    pretend(module, monkeypatch, last_line, file)
    assert module.main() == 0
    told = report(tmp_path)
    assert told["gpus"][0]["name"] == "A GPU"
    assert told["steps"]["numbers"]["result"] == {"speed": 2}
    assert told["steps"]["numbers"]["printed"] == []
    assert told["steps"]["file"]["result"] == [1, 2]
    assert (told["steps"]["file"]["exit"], told["steps"]["file"]["passed"]) == (3, True)
    assert "failed: none" in capsys.readouterr().err


def test_what_fails_is_told_and_the_rest_is_run(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crash = python(module, "crash", "print('so far so good'); import os; os.abort()")
    absent = module.Step("absent", (str(tmp_path / "no-such-command"),), tmp_path)
    silent = python(module, "silent", "pass", result=tmp_path / "never.json")
    pretend(module, monkeypatch, crash, absent, silent, python(module, "last", "print('{}')"))
    assert module.main() == 3
    steps = report(tmp_path)["steps"]
    assert steps["crash"]["printed"][0] == "so far so good"
    assert not steps["crash"]["passed"]
    assert not steps["absent"]["passed"]
    assert "No such file" in steps["absent"]["printed"][0]
    assert steps["last"] == {**steps["last"], "passed": True, "result": {}}
    assert "failed: crash, absent, silent" in capsys.readouterr().err


def test_the_time_limit_ends_a_step_and_those_after_it(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slow = python(module, "slow", "print('measured'); import time; time.sleep(600)")
    pretend(module, monkeypatch, slow, python(module, "after", "print('{}')"))
    assert module.main(minutes=2 / 60) == 3
    steps = report(tmp_path)["steps"]
    assert "the time limit was reached" in steps["slow"]["printed"][-1]
    assert steps["after"]["printed"] == ["not run: the time limit was reached (--minutes)"]
    assert [(told["exit"], told["passed"]) for told in steps.values()] == [(None, False)] * 2


def test_benchmarks_come_first(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "takes_device", lambda path: path.stem in ("training", "deploy"))
    names = [step.name for step in module.steps(tmp_path)]
    assert names[:4] == ["doctor", "training", "deploy", "train"]
    assert names[-1] == "tests"


@pytest.mark.parametrize(("cases", "code"), [("", 3), ('<testcase name="runs"/>', 0)])
def test_tests_that_were_all_skipped_have_shown_nothing(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cases: str, code: int
) -> None:
    """As with a torch that was built for the CPU: pytest itself is content."""
    skipped = '<testcase name="skips"><skipped message="needs a CUDA device"/></testcase>'
    (tmp_path / "tests.xml").write_text(f"<testsuites>{skipped}{cases}</testsuites>")
    pretend(module, monkeypatch, python(module, "tests", "", result=tmp_path / "tests.xml"))
    assert module.main() == code


def test_outcomes_of_tests(module: Any, tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(JUNIT)
    found = module.outcomes(tmp_path / "tests.xml")
    assert found["counts"] == {"passed": 1, "failed": 2, "skipped": 1}
    assert found["failed"][0] == {"test": "tests.a::fails", "said": "assert 1 == 2"}
    assert found["failed"][1]["said"] == "no fixture"
    assert found["skipped"] == [{"test": "tests.a::skips", "why": "needs two GPUs"}]


def test_the_commands_have_the_options_that_it_uses(module: Any, tmp_path: Path) -> None:
    for step in module.chain(tmp_path):
        check_usage([Path(step.command[0]).name, *step.command[1:]])


def test_steps(module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "takes_device", lambda path: path.stem == "training")
    names = [step.name for step in module.steps(tmp_path)]
    assert names[:4] == ["doctor", "training", "train", "compact"]
    assert names[-1] == "tests"
    assert "deploy-trt-int8" in names
