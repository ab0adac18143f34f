"""Networks by name: our own families, torchvision, timm, or a function of the user's.

`cifar` and `imagenet` are families with gates in place; all others get theirs from
:func:`eps_train.gating.rewriting.insert_gates`: `torchvision:resnet50`, `timm:resnetv2_50`,
`mypackage.module:factory`.

Security: a name may come from a file that a stranger wrote, and a factory is a function that is
called. So only a function with an argument for the number of classes counts as a factory, it is
called with that and the number of channels and nothing else, and Python's own modules are excluded.
Networks of timm accept further arguments (`timm:NAME,img_size=64`), but none that reads a file or
downloads.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from torch import Tensor, fx, hub, nn

from eps_core.errors import ConfigError, one_line
from eps_train.data.downloads import import_torchvision
from eps_train.models.resnets import CifarResNet, ImageNetResNet

Factory = Callable[..., nn.Module]

FAMILIES: dict[str, Factory] = {"cifar": CifarResNet, "imagenet": ImageNetResNet}

_LIBRARIES = ("torchvision", "timm")

# Names of the arguments for the number of classes and of image channels.
_CLASSES = ("num_classes", "classes", "n_classes")
_CHANNELS = ("in_chans", "in_channels", "input_channels")

# Arguments of timm's `create_model` that read files or return a module of another kind.
_NOT_FOR_TIMM = frozenset(
    {"pretrained", "checkpoint_path", "cache_dir", "features_only", "scriptable", "exportable"}
    | {"no_jit", *_CLASSES, *_CHANNELS}
)


def arguments_for(name: str, *, in_channels: int, classes: int) -> dict[str, int]:
    """Arguments for the named factory (not a family), from its signature.

    Raises ConfigError when there is no such factory, it requires others, or it has no argument for
    the number of classes.
    """
    parameters = _parameters(name, find(name))
    arguments = {}
    for names, value in ((_CLASSES, classes), (_CHANNELS, in_channels)):
        if chosen := next((known for known in names if known in parameters), None):
            arguments[chosen] = value
    if not parameters.keys() & set(_CLASSES):
        raise ConfigError(
            f"{name}: not a network factory: it has none of the arguments {', '.join(_CLASSES)}"
        )
    needed = [
        parameter.name
        for parameter in parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name not in arguments
    ]
    if needed:
        raise ConfigError(
            f"{name}: requires {', '.join(needed)} too; a factory is called with {_CLASSES[0]}, and"
            f" with {_CHANNELS[0]} if it has that, so give the others a default"
        )
    return arguments


def split_arguments(text: str) -> tuple[str, dict[str, Any]]:
    """Split `timm:NAME,img_size=64` into name and arguments.

    Values are numbers, true, false and identifiers. Raises ConfigError for arguments that cannot be
    read or are not permitted.
    """
    name, *given = text.split(",")
    arguments = {}
    for part in given:
        key, _, value = part.partition("=")
        arguments[key] = _value(value)
        if not _is_further(name, key, arguments[key]):
            raise ConfigError(
                f"{text}: {part} is not a permitted argument;"
                " write timm:NAME,ARGUMENT=VALUE, as in timm:vit_tiny_patch16_224,img_size=64"
            )
    return name, arguments


def _value(text: str) -> Any:
    if text in ("true", "True", "false", "False"):
        return text[0] in "tT"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _is_further(name: str, key: str, value: Any) -> bool:
    """Whether a network may have this argument besides those for classes and channels."""
    if not name.startswith("timm:") or not key.isidentifier() or key in _NOT_FOR_TIMM:
        return False
    if key.startswith("pretrained"):
        return False
    return type(value) in (int, float, bool) or (type(value) is str and value.isidentifier())


def make(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Call the named family or factory.

    Raises:
        ConfigError: no such name, other arguments than it has, a factory that failed or that did
            not return a network.
        ValueError: the family has no member of this size.
    """
    factory = FAMILIES.get(name) or find(name)
    ends = {n for n, value in arguments.items() if not _is_further(name, n, value)}
    numbers = all(type(arguments[n]) is int for n in ends)
    if not (numbers and ends <= _parameters(name, factory).keys()):
        raise ConfigError(f"{name}: has no arguments {dict(arguments)}")
    if name in FAMILIES:
        return factory(**arguments)
    if not ends <= {*_CLASSES, *_CHANNELS} or not ends & set(_CLASSES):
        raise ConfigError(f"{name}: not a network factory with arguments {dict(arguments)}")
    try:
        model = factory(**arguments)
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(
            f"{name}: failed with {type(error).__name__}: {one_line(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name}: returned {type(model).__name__}, not torch.nn.Module")
    return model


def check_ends(name: str, model: fx.GraphModule, *, in_channels: int, classes: int) -> None:
    """Raise ConfigError when a network's channels or classes are not those of the data.

    Checks the convolution that takes the images, and the linear layer that the output comes from.
    """
    modules = dict(model.named_modules())
    images = next(node for node in model.graph.nodes if node.op == "placeholder")
    readers = [modules.get(str(node.target)) for node in images.users]
    first = next((layer for layer in readers if isinstance(layer, nn.Conv2d)), None)
    if first is not None and first.in_channels != in_channels:
        raise ConfigError(
            f"{name}: takes images of {first.in_channels} channels, the data has {in_channels};"
            f" choose a network with an argument for it ({_CHANNELS[0]}), as those of timm have"
        )
    last = next(node for node in model.graph.nodes if node.op == "output").args[0]
    if not isinstance(last, fx.Node):
        raise ConfigError(f"{name}: returns several outputs; it must return logits alone")
    while last.op != "call_module" and len(last.all_input_nodes) == 1:
        last = last.all_input_nodes[0]
    layer = modules.get(str(last.target))
    if isinstance(layer, nn.Linear) and layer.out_features != classes:
        raise ConfigError(
            f"{name}: returns {layer.out_features} logits, the data has {classes} classes"
        )


def find(name: str) -> Factory:
    """Return the factory of that name, without calling it. Raises ConfigError."""
    module_name, _, member = name.partition(":")
    if module_name in _LIBRARIES:
        return _from_library(name, module_name, member)
    parts = [*module_name.split("."), member]
    if not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{name}: not a network; write mypackage.module:factory")
    if parts[0] in sys.stdlib_module_names:
        raise ConfigError(f"{name}: {parts[0]} is part of Python and has no networks")
    try:
        found: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{name}: no module named {error.name}; install it, or set PYTHONPATH to its folder"
        ) from None
    if not hasattr(found, member):
        raise _unknown(name, member, [n for n in dir(found) if not n.startswith("_")])
    factory: Factory = getattr(found, member)
    return factory


def _from_library(name: str, library: str, member: str) -> Factory:
    install = "pip install 'eps-resnet[train]'" if library == "torchvision" else "pip install timm"
    try:
        import_torchvision()  # which timm imports too
        found = import_module("torchvision.models" if library == "torchvision" else "timm")
    except ModuleNotFoundError as error:
        raise ConfigError(f"{name}: {error.name} is not installed; {install}") from None
    except (ImportError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"{name}: {library} cannot be imported ({one_line(error)}); torchvision's build must"
            " match torch's, so install both from the same index"
        ) from None
    if library == "torchvision":
        known = found.list_models(module=found)  # networks for classification alone
        factory: Factory = partial(_torchvision_model, found, member)
    else:
        known = found.list_models()
        factory = partial(_timm_model, found, member)
    # A name of timm's may have the tag of its pretrained weights.
    if member not in known and not (library == "timm" and found.is_model(member)):
        raise _unknown(name, member, known)
    return factory


def _torchvision_model(
    models: Any, member: str, *, num_classes: int, in_chans: int = 3
) -> nn.Module:
    # These two warn of a default that is going to change, unless it is given.
    given = {"init_weights": True} if member in ("googlenet", "inception_v3") else {}
    model: nn.Module = models.get_model(member, weights=None, num_classes=num_classes, **given)
    if in_chans != 3:  # torchvision has no argument for it
        first = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
        first.weight = nn.Parameter(first.weight.detach()[:, :in_chans].clone())
        first.in_channels = in_chans
    return model


def _timm_model(
    timm: Any, member: str, *, num_classes: int, in_chans: int, **further: Any
) -> nn.Module:
    model: nn.Module = timm.create_model(
        member, pretrained=False, num_classes=num_classes, in_chans=in_chans, **further
    )
    return model


# -- Pretrained weights: the libraries' own download and cache

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # what most weights are trained with


class NoWeightsError(ConfigError):
    """The library has no weights for this network."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainedWeights:
    """The weights that a library publishes for a network, not read yet.

    Attributes:
        source: the file, or the repository, that the library fetches.
        mean, std: per channel (RGB, 0..1), by which images were normalized in training.
        fetch: returns the network with these weights, for the classes it was trained on; from the
            library's cache where they are there.
        remedy: what to do without a network.
    """

    source: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fetch: Callable[[], nn.Module]
    remedy: str

    def state(self, name: str) -> dict[str, Tensor]:
        """Read the tensors of the network `name`. Raises ConfigError where it is impossible."""
        try:
            return dict(self.fetch().state_dict())
        except Exception as error:  # each library, and each server, raises others
            raise ConfigError(
                f"--pretrained: {name}: cannot fetch {self.source} ({one_line(error)});"
                f" {self.remedy}"
            ) from error


def pretrained(text: str) -> PretrainedWeights:
    """The published weights of `--model text`. Raises ConfigError when there are none."""
    name, further = split_arguments(text)
    library, _, member = name.partition(":")
    if library not in _LIBRARIES:
        raise ConfigError(
            f"--pretrained: {name}: only networks of torchvision and timm have published weights;"
            " give a file with --weights"
        )
    find(name)
    return _of_timm(name, member, further) if library == "timm" else _of_torchvision(member)


def normalization(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std (0..1, per channel) for weights of `--model text`: the library's or ImageNet's.

    Raises ConfigError when there is no such network.
    """
    if text.partition(":")[0] not in _LIBRARIES:
        return IMAGENET
    try:
        found = pretrained(text)
    except NoWeightsError:
        return IMAGENET
    return found.mean, found.std


def _of_torchvision(member: str) -> PretrainedWeights:
    models = import_module("torchvision.models")
    weights = models.get_model_weights(member).DEFAULT
    how = weights.transforms()
    return PretrainedWeights(
        source=weights.url,
        mean=tuple(how.mean),
        std=tuple(how.std),
        fetch=lambda: models.get_model(member, weights=weights),
        remedy=(
            f"fetch it where there is a network, and put it into {hub.get_dir()}/checkpoints or"
            " give it with --weights"
        ),
    )


def _of_timm(name: str, member: str, further: Mapping[str, Any]) -> PretrainedWeights:
    timm = import_module("timm")
    found = timm.get_pretrained_cfg(member)
    if found is None or not found.has_weights:
        known = timm.list_pretrained(f"{member.partition('.')[0]}*")[:5]
        near = f"; it has some for {', '.join(known)}" if known else ""
        raise NoWeightsError(f"--pretrained: {name}: timm publishes no weights for it{near}")

    def fetch() -> nn.Module:
        import_module("huggingface_hub").logging.set_verbosity_error()  # a line for every retry
        model: nn.Module = timm.create_model(member, pretrained=True, **further)
        return model

    return PretrainedWeights(
        source=f"{found.hf_hub_id}/model.safetensors" if found.hf_hub_id else found.url,
        mean=tuple(found.mean),
        std=tuple(found.std),
        fetch=fetch,
        remedy="fetch it where there is a network, and give it with --weights",
    )


def _parameters(name: str, factory: Factory) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(factory).parameters
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: its arguments are unknown ({error})") from None


def _unknown(name: str, member: str, known: Iterable[str]) -> ConfigError:
    near = difflib.get_close_matches(member, list(known), n=5, cutoff=0.6)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return ConfigError(f"{name}: there is no network {member} in {name.partition(':')[0]}{hint}")
