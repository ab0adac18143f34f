"""Engines broken on purpose: each must fail at least one of the checks that ours passes."""

from __future__ import annotations

from typing import Any

import pytest

from eps_deploy.engines.trt import engine
from tests.deploy.engines.trt.mutation import install, mutated
from tests.deploy.engines.trt.run_checks import noticed

_READ = """            self._stream.synchronize()
            logits"""
_SOURCE = "self._host_images.array[:size], self._stream"
_PROFILE = "profile = self._plan.profile_of(size)"
_SELECTED = "selected = context.set_optimization_profile_async(profile, self._stream.handle)"
_LAUNCH = "self._launch(self.graphs.get(size), "
_NEW_CONTEXT = "self._contexts[size] = self._plan.create_context()"
_FIRST_RUN = """            self._require(self._enqueue(size), "queues no inference", messages)
            self._stream.synchronize()
"""
_STAGED = "np.copyto(self._host_images.array[: len(images)], images"

# Each by what breaks: which module, which text in it, what stands there instead.
MUTATIONS: dict[str, tuple[Any, list[tuple[str, str]]]] = {
    "addresses swapped": (
        engine,
        [("(INPUT_NAME, self._images), (OUTPUT_NAME", "(OUTPUT_NAME, self._images), (INPUT_NAME")],
    ),
    "one context for all batch sizes": (
        engine,
        [
            (
                _NEW_CONTEXT,
                "self._contexts[size] = next(iter(self._contexts.values()), None)"
                " or self._plan.create_context()",
            )
        ],
    ),
    "the first profile for all batch sizes": (engine, [(_PROFILE, "profile = 0")]),
    "the last profile for all batch sizes": (
        engine,
        [(_PROFILE, "profile = len(self._plan.profiles) - 1")],
    ),
    "a profile that there is not": (engine, [(_PROFILE, "profile = 2")]),
    "no profile selected": (engine, [(_SELECTED, "selected = True")]),
    "the profile selected after the shape": (
        engine,
        [
            (_SELECTED, "selected = True"),
            (
                "        for name, memory in ((INPUT",
                f"        {_SELECTED}\n        for name, memory in ((INPUT",
            ),
        ],
    ),
    "a refused profile ignored": (engine, [("self._require(selected,", "self._require(True,")]),
    "the graph of the largest size": (
        engine,
        [(_LAUNCH, "self._launch(self.graphs.get(max(self.graphs, default=0)), ")],
    ),
    "the graph of the smallest size": (
        engine,
        [(_LAUNCH, "self._launch(self.graphs.get(min(self.graphs, default=0)), ")],
    ),
    "padded to the next smaller size": (
        engine,
        [
            (
                "next(size for size in self._sizes if size >= len(images))",
                "max(size for size in self._sizes if size <= len(images))",
            )
        ],
    ),
    "not padded": (
        engine,
        [
            (
                "return next(size for size in self._sizes if size >= len(images))",
                "return len(images)",
            )
        ],
    ),
    "padded past the profile": (
        engine,
        [("self._sizes = padded_sizes(plan.max_batch)", "self._sizes = (1, 2, 4, 8)")],
    ),
    "images of the first batch recorded": (
        engine,
        [
            (_STAGED, "self.count = len(images); " + _STAGED),
            (_SOURCE, _SOURCE.replace("size", "self.count")),
        ],
    ),
    "logits of the first batch recorded": (
        engine,
        [
            (_STAGED, "self.count = len(images); " + _STAGED),
            ("self._host_logits.array[:size]", "self._host_logits.array[: self.count]"),
        ],
    ),
    "recorded without its copies": (
        engine,
        [
            (
                "self._capture(partial(self._enqueue_whole, size))",
                "self._capture(partial(self._enqueue, size))",
            )
        ],
    ),
    "timed with its copies": (
        engine,
        [
            (
                "self._capture(enqueue)",
                "self._capture(partial(self._enqueue_whole, size))",
            )
        ],
    ),
    "logits copied before they are computed": (
        engine,
        [
            (
                "        self._copy_in(size)\n        if not",
                "        self._copy_in(size)\n        self._copy_out(size)\n        if not",
            ),
            ("        self._copy_out(size)\n        return True", "        return True"),
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
    "a refused run ignored": (
        engine,
        [("self._require(enqueue(),", "self._require(enqueue() or True,")],
    ),
    "a refused first run ignored": (
        engine,
        [
            (
                _FIRST_RUN,
                _FIRST_RUN.replace(
                    "self._require(self._enqueue(size),",
                    "self._require(self._enqueue(size) or True,",
                ),
            )
        ],
    ),
    "unknown shapes ignored": (engine, [("self._require(not unknown,", "self._require(True,")]),
    "images buffer for the optimal batch": (
        engine,
        [("images = (plan.max_batch", "images = (plan.profiles[-1][1]")],
    ),
    "memory of the GPU for the optimal batch": (
        engine,
        [("math.prod(images))", "math.prod(images) // 8 * plan.profiles[-1][1])")],
    ),
    "logits buffer for the optimal batch": (
        engine,
        [("logits = (plan.max_batch", "logits = (plan.profiles[-1][1]")],
    ),
    "copied from memory that is not page-locked": (
        engine,
        [(_SOURCE, "np.array(self._host_images.array[:size]), self._stream")],
    ),
    "copied from memory that is freed early": (
        engine,
        [
            (
                f"self._cuda.copy_in(self._images, {_SOURCE})",
                "early = self._cuda.page_locked(self._host_images.array[:size].shape, np.uint8);"
                " early.array[:] = self._host_images.array[:size];"
                " self._cuda.copy_in(self._images, early.array, self._stream); early.free()",
            )
        ],
    ),
    "the caller gets the buffer itself": (engine, [("[: len(images)].copy()", "[: len(images)]")]),
    "recorded without a first run": (
        engine,
        [(_FIRST_RUN, "")],
    ),
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
        [("execute_async_v3(self._stream.handle)", "execute_async_v3(0)")],
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
