"""Engines broken on purpose: each must fail at least one of the checks that ours passes."""

from __future__ import annotations

from typing import Any

import pytest

from eps_deploy.engines.trt import lane, run

from .mutation import install, mutated
from .run_checks import noticed

_SET = """            self._set(self._common, batch, log)
            return _Pass"""
_READ = """            self._stream.synchronize()
            logits"""
_STAGED = "staged = self._host_images.array[: len(images)]"
_OWN = """        self._spare = None
        return own"""

# Each by what breaks: which module, which text in it, what stands there instead.
MUTATIONS: dict[str, tuple[Any, list[tuple[str, str]]]] = {
    "addresses swapped": (
        lane,
        [("(INPUT_NAME, self._images), (OUTPUT_NAME", "(OUTPUT_NAME, self._images), (INPUT_NAME")],
    ),
    "shape set for a larger batch alone": (
        lane,
        [
            (
                _SET,
                _SET.replace(
                    "self._set(self._common, batch, log)",
                    "if batch > getattr(self, 'most', 0):"
                    " self._set(self._common, batch, log); self.most = batch",
                ),
            )
        ],
    ),
    "shape set once": (
        lane,
        [
            (
                _SET,
                _SET.replace("self._set", "if not hasattr(self, 'once'): self.once = self._set"),
            )
        ],
    ),
    "not waited for": (lane, [(_READ, "            logits")]),
    "float32 for uint8": (
        lane,
        [
            ("cuda.page_locked(images, np.uint8)", "cuda.page_locked(images, np.float32)"),
            ('casting="no"', 'casting="unsafe"'),
        ],
    ),
    "a refused shape ignored": (lane, [("self._require(accepted,", "self._require(True,")]),
    "a refused address ignored": (lane, [("self._require(taken,", "self._require(True,")]),
    "a refused run ignored": (lane, [("self._require(done,", "self._require(True,")]),
    "unknown shapes ignored": (lane, [("self._require(not unknown,", "self._require(True,")]),
    "images buffer for the optimal batch": (
        lane,
        [("images = (plan.profile[2]", "images = (plan.profile[1]")],
    ),
    "memory of the GPU for the optimal batch": (
        lane,
        [("math.prod(images))", "math.prod(images) // 8 * plan.profile[1])")],
    ),
    "logits buffer for the optimal batch": (
        lane,
        [("logits = (plan.profile[2]", "logits = (plan.profile[1]")],
    ),
    "copied from memory that is not page-locked": (
        lane,
        [(_STAGED, "staged = np.empty(images.shape, np.uint8)")],
    ),
    "copied from memory that is freed early": (
        lane,
        [
            (
                "self._cuda.copy_in(self._images, staged, self._stream)",
                "early = self._cuda.page_locked(images.shape, np.uint8); early.array[:] = images;"
                " self._cuda.copy_in(self._images, early.array, self._stream); early.free()",
            )
        ],
    ),
    "the caller gets the buffer itself": (lane, [("found.copy()", "found")]),
    "recorded without a first run": (
        lane,
        [("self._enqueue(_Pass(context, None), log)  # once", "pass  # once")],
    ),
    "one context for all graphs": (lane, [(_OWN, "        return own")]),
    "sidecar not checked": (run, [("        sidecar.check(plan, self._host, name=name)\n", "")]),
    "memory freed before the contexts": (
        run,
        [
            ("steps.callback(lane.free)", "steps.callback(lane.release)"),
            (
                "                steps.callback(lane.release)\n\n    @",
                "                steps.callback(lane.free)\n\n    @",
            ),
        ],
    ),
    "plan freed before the contexts": (
        run,
        [
            ("            steps.callback(self._plan.free)\n", ""),
            (
                "steps.callback(lane.release)",
                "steps.callback(lane.release)\n            steps.callback(self._plan.free)",
            ),
        ],
    ),
    "one lane for all threads": (
        run,
        [
            ("return self._idle.pop()", "return self._lanes[0]"),
            ("self._idle.append(lane)", "pass"),
        ],
    ),
    "no context in the thread": (
        run,
        [("with self._cuda.current():\n            lane", "if True:\n            lane")],
    ),
    "nothing freed": (run, [("            self._free()\n", "            pass\n")]),
    "default stream": (
        lane,
        [("self._stream.handle)\n            self._require", "0)\n            self._require")],
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_engine_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, edits = MUTATIONS[name]
    broken = mutated(module, *edits)
    if module is lane:
        install(monkeypatch, run, lane, broken)
        kind = run.TrtEngine
    else:
        kind = broken.TrtEngine
    assert noticed(kind), f"{name}: no check fails"


def test_the_engine_as_it_is_is_not() -> None:
    """Or the test above would prove nothing."""
    assert not noticed(run.TrtEngine)
