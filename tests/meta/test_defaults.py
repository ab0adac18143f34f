"""Every parameter with a default is passed somewhere in production code.

A default that nothing overrides is either a constant in disguise or, worse, an option that was
never wired. Calls are matched by the callee's bare name, so functions of one name share theirs.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tests.meta.project import files, packages

_TESTS = "tests put their own in its place"
_FACTORY = "called through FAMILIES with what the network's name says"
_OPTION = "the option of eps-train sets it"
_SECTION = "called as _run, _pruning and so on, one for each section of the help"
_LIBRARY = "public API: the loop or notebook of a user passes it"
_FX = "torch.fx passes what the network's own call passed"

EXCEPTIONS = {
    "save(network)": _LIBRARY,
    "insert_gates(epsilon)": "public API; eps-train sets its thresholds epoch by epoch",
    "compact(dead)": "public API; eps-compact latches gates instead",
    "BlockPruner(classes)": _LIBRARY,
    "BlockPruner(criterion)": _LIBRARY,
    "BlockPruner(epsilon)": _LIBRARY,
    "BlockPruner(live_removal)": _LIBRARY,
    "BlockPruner(max_accuracy_drop)": _LIBRARY,
    "BlockPruner(patience)": _LIBRARY,
    "BlockPruner(relative)": _LIBRARY,
    "BlockPruner(target)": _LIBRARY,
    "BlockPruning(averaged)": _LIBRARY,
    "BlockPruning(heldout)": _LIBRARY,
    "BlockPruningCallback(averaged)": _LIBRARY,
    "BlockPruningCallback(inputs)": _LIBRARY,
    "compact_pruner(averaged)": _LIBRARY,
    "compact_pruner(folding)": _LIBRARY,
    "compact_pruner(heldout)": _LIBRARY,
    "compact_pruner(report)": _LIBRARY,
    "deploy(baseline)": _LIBRARY,
    "deploy(calibration)": _LIBRARY,
    "deploy(engine)": _LIBRARY,
    "deploy(log)": _LIBRARY,
    "deploy(output)": _LIBRARY,
    "deploy(precision)": _LIBRARY,
    "end_epoch(metric)": _LIBRARY,
    "load_state_dict(averaged)": _LIBRARY,
    "on_epoch_end(optimizer)": _LIBRARY,
    "on_train_begin(model)": _LIBRARY,
    "save(averaged)": _LIBRARY,
    "save(data)": _LIBRARY,
    "save(data_root)": _LIBRARY,
    "_torchvision_model(in_chans)": _FACTORY,
    "TrainingConfig(class_weights)": _OPTION,
    "TrainingConfig(clip_grad_norm)": _OPTION,
    "TrainingConfig(criterion)": _OPTION,
    "TrainingConfig(cutmix)": _OPTION,
    "TrainingConfig(distillation_weight)": _OPTION,
    "TrainingConfig(early_stopping)": _OPTION,
    "TrainingConfig(live_removal)": _OPTION,
    "TrainingConfig(max_accuracy_drop)": _OPTION,
    "TrainingConfig(mixup)": _OPTION,
    "TrainingConfig(momentum)": _OPTION,
    "TrainingConfig(optimizer)": _OPTION,
    "TrainingConfig(patience)": _OPTION,
    "TrainingConfig(relative_epsilon)": _OPTION,
    "TrainingConfig(seed)": _OPTION,
    "TrainingConfig(self_distillation)": _OPTION,
    "TrainingConfig(target_latency)": _OPTION,
    "TrainingConfig(temperature)": _OPTION,
    "TrainingConfig(timer)": _OPTION,
    "_option(default)": _SECTION,
    "_option(values)": _SECTION,
    "TrtEngine(use_graphs)": "graphs and launches are compared by tests",
    "executed_types(exact_qdq)": "exact and fused arithmetic are compared by a test",
    "examine(ask)": _TESTS,
    "serve(started)": _TESTS,
    "measure(clock)": _TESTS,
    "sweep_batches(clock)": _TESTS,
    "Cuda(bindings)": _TESTS,
    "Cuda(driver)": _TESTS,
    "PlanCache(cuda)": _TESTS,
    "PlanCache(trt)": _TESTS,
    "Limits(body_seconds)": _TESTS,
    "Limits(header)": _TESTS,
    "Limits(header_seconds)": _TESTS,
    "Limits(idle_seconds)": _TESTS,
    "Limits(json)": _TESTS,
    "Limits(write_seconds)": _TESTS,
    "__torch_dispatch__(args)": "torch's signature",
    "__torch_dispatch__(kwargs)": "torch's signature",
    "CifarResNet(classes)": _FACTORY,
    "CifarResNet(in_channels)": _FACTORY,
    "CifarResNet(width)": _FACTORY,
    "ImageNetResNet(classes)": _FACTORY,
    "ImageNetResNet(in_channels)": _FACTORY,
    "ImageNetResNet(width)": _FACTORY,
    "_pad(mode)": _FX,
    "_pad(value)": _FX,
    "_relu(inplace)": _FX,
}


@dataclass
class Passed:
    """What the calls of one name pass: at most so many positions, keywords, or anything (`**`)."""

    positions: int = 0
    keywords: set[str] = field(default_factory=set)
    anything: bool = False

    def add(self, call: ast.Call, first: int) -> None:
        self.positions = max(self.positions, len(call.args) - first)
        self.keywords |= {word.arg for word in call.keywords if word.arg is not None}
        self.anything |= any(word.arg is None for word in call.keywords)
        self.anything |= any(isinstance(argument, ast.Starred) for argument in call.args)

    def has(self, parameter: str, position: int | None) -> bool:
        by_position = position is not None and position < self.positions
        return self.anything or by_position or parameter in self.keywords


def _defaults(node: ast.AST, owner: ast.ClassDef | None) -> Iterator[tuple[str, str, int | None]]:
    """Callee's name, parameter and position (None: keyword only) of every default of `node`."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        name = owner.name if owner and node.name == "__init__" else node.name
        positional = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        if owner and positional[:1] in (["self"], ["cls"]):
            del positional[0]
        first = len(positional) - len(node.args.defaults)
        yield from ((name, word, first + i) for i, word in enumerate(positional[first:]))
        for word, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
            if default is not None:
                yield name, word.arg, None
    elif isinstance(node, ast.ClassDef) and "frozen=True" in map(ast.unparse, _options(node)):
        fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
        for position, item in enumerate(fields):
            if item.value is not None and "init=False" not in ast.unparse(item.value):
                yield node.name, ast.unparse(item.target), position


def _options(node: ast.ClassDef) -> Iterator[ast.keyword]:
    """Keywords of the decorators: a dataclass that is not frozen holds state in its fields."""
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call):
            yield from decorator.keywords


def _name(expression: ast.expr) -> str:
    """`f` of `f`, `module.f`, `module.f(...)`."""
    if isinstance(expression, ast.Call):
        return _name(expression.func)
    if isinstance(expression, ast.Attribute):
        return expression.attr
    return expression.id if isinstance(expression, ast.Name) else ""


def never_passed(sources: Iterable[str]) -> list[str]:
    """`function(parameter)` of each default that no call in `sources` overrides, sorted."""
    defaults: list[tuple[str, str, int | None]] = []
    passed: defaultdict[str, Passed] = defaultdict(Passed)

    def visit(node: ast.AST, owner: ast.ClassDef | None) -> None:
        defaults.extend(_defaults(node, owner))
        if isinstance(node, ast.Call):
            partial = _name(node.func) == "partial" and bool(node.args)
            name = _name(node.args[0] if partial else node.func)
            passed[owner.name if owner and name == "cls" else name].add(node, first=int(partial))
        for child in ast.iter_child_nodes(node):
            visit(child, node if isinstance(node, ast.ClassDef) else owner)

    for source in sources:
        visit(ast.parse(source), None)
    replaced = passed["replace"].keywords  # fields of frozen dataclasses
    return sorted(
        f"{name}({parameter})"
        for name, parameter, position in defaults
        if not passed[name].has(parameter, position)
        and not (name[0].isupper() and parameter in replaced)
    )


def test_every_default_is_overridden_somewhere() -> None:
    folders = tuple(packages().values())
    sources = (
        path.read_text(encoding="utf-8")
        for path in files()
        if path.suffix == ".py" and any(path.is_relative_to(folder) for folder in folders)
    )
    found = never_passed(sources)
    new = [name for name in found if name not in EXCEPTIONS]
    assert not new, "pass these parameters, or remove them, or list them with a reason"
    stale = [name for name in EXCEPTIONS if name not in found]
    assert not stale, "these exceptions are no longer needed: remove them"


def test_what_counts_as_passed() -> None:
    source = """
@dataclass(frozen=True)
class Limits:
    low: int
    high: int = 1
    wide: bool = False
    seen: int = field(init=False, default=0)

class Server:
    def __init__(self, port=0, host=""): ...
    @classmethod
    def local(cls): return cls(80)
    def stop(self, now=False, *, quiet=False): ...

def load(path, name=None, *, strict=True): ...

Limits(1, 2); replace(limits, wide=True)
server.stop(True)
partial(load, path, "x")
"""
    assert never_passed([source]) == ["Server(host)", "load(strict)", "stop(quiet)"]
    assert never_passed([source, "load(**options); server.stop(*given)"]) == ["Server(host)"]
