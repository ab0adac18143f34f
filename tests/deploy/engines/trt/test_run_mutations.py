"""Engines broken on purpose: each must fail at least one of the checks that ours passes."""

from __future__ import annotations

from typing import Any

import pytest

from eps_deploy.engines.trt import engine
from tests.deploy.engines.trt.mutation import install, mutated
from tests.deploy.engines.trt.run_checks import noticed

_SET = """            self._set(self._common, batch, messages)
            return _Pass"""
_READ = """            self._stream.synchronize()
            logits"""
_STAGED = "staged = self._host_images.array[: len(images)]"
_OWN = """        self._spare = None
        return own"""

# Each by what breaks: which module, which text in it, what stands there instead.
MUTATIONS: dict[str, tuple[Any, list[tuple[str, str]]]] = {
    "addresses swapped": (
        engine,
        [("(INPUT_NAME, self._images), (OUTPUT_NAME", "(OUTPUT_NAME, self._images), (INPUT_NAME")],
    ),
    "shape set for a larger batch alone": (
        engine,
        [
            (
                _SET,
                _SET.replace(
                    "self._set(self._common, batch, messages)",
                    "if batch > getattr(self, 'most', 0):"
                    " self._set(self._common, batch, messages); self.most = batch",
                ),
            )
        ],
    ),
    "shape set once": (
        engine,
        [
            (
                _SET,
                _SET.replace("self._set", "if not hasattr(self, 'once'): self.once = self._set"),
            )
        ],
    ),
    "not waited for": (engine, [(_READ, "            logits")]),
    "float32 for uint8": (
        engine,
        [
            ("cuda.page_locked(images, np.uint8)", "cuda.page_locked(images, np.float32)"),
            ('casting="no"', 'casting="unsafe"'),
        ],
    ),
    "a refused shape ignored": (engine, [("self._require(accepted,", "self._require(True,")]),
    "a refused address ignored": (engine, [("self._require(taken,", "self._require(True,")]),
    "a refused run ignored": (engine, [("self._require(done,", "self._require(True,")]),
    "unknown shapes ignored": (engine, [("self._require(not unknown,", "self._require(True,")]),
    "images buffer for the optimal batch": (
        engine,
        [("images = (plan.profile[2]", "images = (plan.profile[1]")],
    ),
    "memory of the GPU for the optimal batch": (
        engine,
        [("math.prod(images))", "math.prod(images) // 8 * plan.profile[1])")],
    ),
    "logits buffer for the optimal batch": (
        engine,
        [("logits = (plan.profile[2]", "logits = (plan.profile[1]")],
    ),
    "copied from memory that is not page-locked": (
        engine,
        [(_STAGED, "staged = np.empty(images.shape, np.uint8)")],
    ),
    "copied from memory that is freed early": (
        engine,
        [
            (
                "self._cuda.copy_in(self._images, staged, self._stream)",
                "early = self._cuda.page_locked(images.shape, np.uint8); early.array[:] = images;"
                " self._cuda.copy_in(self._images, early.array, self._stream); early.free()",
            )
        ],
    ),
    "the caller gets the buffer itself": (engine, [("found.copy()", "found")]),
    "recorded without a first run": (
        engine,
        [("self._enqueue(_Pass(context, None), messages)  # once", "pass  # once")],
    ),
    "one context for all graphs": (engine, [(_OWN, "        return own")]),
    "metadata not checked": (
        engine,
        [("        metadata.check(plan, self._host, name=name)\n", "")],
    ),
    "memory freed before the contexts": (
        engine,
        [
            ("steps.callback(context.free)", "steps.callback(context.release)"),
            (
                "                steps.callback(context.release)\n\n    @",
                "                steps.callback(context.free)\n\n    @",
            ),
        ],
    ),
    "plan freed before the contexts": (
        engine,
        [
            ("            steps.callback(self._plan.free)\n", ""),
            (
                "steps.callback(context.release)",
                "steps.callback(context.release)\n            steps.callback(self._plan.free)",
            ),
        ],
    ),
    "one execution context for all threads": (
        engine,
        [
            ("context = self._idle.pop()", "context = self._contexts[0]"),
            ("self._idle.append(context)", "pass"),
        ],
    ),
    "no context in the thread": (
        engine,
        [
            (
                "with self._cuda.current():\n            with self._ch",
                "if True:\n            with self._ch",
            )
        ],
    ),
    "nothing freed": (engine, [("            self._free()\n", "            pass\n")]),
    "default stream": (
        engine,
        [("self._stream.handle)\n            self._require", "0)\n            self._require")],
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_engine_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, edits = MUTATIONS[name]
    broken = mutated(module, *edits)
    if module is engine:
        install(monkeypatch, engine, engine, broken)
        kind = engine.TrtEngine
    else:
        kind = broken.TrtEngine
    assert noticed(kind), f"{name}: no check fails"


def test_the_engine_as_it_is_is_not() -> None:
    """Or the test above would prove nothing."""
    assert not noticed(engine.TrtEngine)
