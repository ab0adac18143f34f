"""Where networks come from: our own families, torchvision, timm, or a function of the user's.

A network is named in text: `cifar` and `imagenet` are families with gates in place, all others get
theirs from :func:`eps_train.gating.rewriting.insert_gates`: `torchvision:resnet50`,
`timm:resnetv2_50`, `mypackage.module:factory`.

A name may come from a file that a stranger wrote, and a factory is a function that is called. So
only a function with an argument for the number of classes is taken for a factory, it gets that and
the number of channels and nothing else, and Python's own modules are not looked into. Networks of
timm may be given more (`timm:NAME,img_size=64`), but nothing that reads a file or a network.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

from torch import fx, nn

from eps_core.errors import ConfigError
from eps_train.data.downloads import import_torchvision
from eps_train.models.cifar import CifarResNet
from eps_train.models.imagenet import ImageNetResNet

Factory = Callable[..., nn.Module]

FAMILIES: dict[str, Factory] = {"cifar": CifarResNet, "imagenet": ImageNetResNet}

# What factories call the number of classes and of the images' channels.
_CLASSES = ("num_classes", "classes", "n_classes")
_CHANNELS = ("in_chans", "in_channels", "input_channels")

# What timm's `create_model` uses itself: for files to read, or a module of another kind.
_NOT_FOR_TIMM = frozenset(
    {"pretrained", "checkpoint_path", "cache_dir", "features_only", "scriptable", "exportable"}
    | {"no_jit", *_CLASSES, *_CHANNELS}
)

_INSTALL = "pip install 'eps-resnet[train]'"
_SAME_BUILD = "torchvision's build must match torch's, so install both from the same index"


def arguments_for(name: str, *, in_channels: int, classes: int) -> dict[str, int]:
    """The arguments that the named factory (no family) takes, by its signature.

    Raises ConfigError when there is no such factory, it needs others, or it cannot be told the
    number of classes.
    """
    parameters = _parameters(name, find(name))
    arguments = {}
    for names, value in ((_CLASSES, classes), (_CHANNELS, in_channels)):
        if chosen := next((known for known in names if known in parameters), None):
            arguments[chosen] = value
    if not parameters.keys() & set(_CLASSES):
        raise ConfigError(
            f"{name}: is no factory of networks: it has none of the arguments {', '.join(_CLASSES)}"
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
            f"{name}: needs {', '.join(needed)} too; a factory is called with {_CLASSES[0]}, and"
            f" with {_CHANNELS[0]} if it has that, so give the others a default"
        )
    return arguments


def split_arguments(text: str) -> tuple[str, dict[str, Any]]:
    """`timm:NAME,img_size=64` as name and arguments; numbers, true, false and words are values.

    Raises ConfigError for what cannot be read, or is not to be given.
    """
    name, *given = text.split(",")
    arguments = {}
    for part in given:
        key, _, value = part.partition("=")
        arguments[key] = _value(value)
        if not _is_further(name, key, arguments[key]):
            raise ConfigError(
                f"{text}: {part} is no argument that a network can be given;"
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
    """Whether a network may be given this argument besides those for classes and channels."""
    if not name.startswith("timm:") or not key.isidentifier() or key in _NOT_FOR_TIMM:
        return False
    if key.startswith("pretrained"):
        return False
    return type(value) in (int, float, bool) or (type(value) is str and value.isidentifier())


def make(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Call the named family or factory.

    Raises:
        ConfigError: no such name, arguments that are not its own, a factory that failed, or
            something else than a network came back.
        ValueError: a family that has no member of this size.
    """
    factory = FAMILIES.get(name) or find(name)
    parameters = _parameters(name, factory)
    further = {n for n, value in arguments.items() if _is_further(name, n, value)}
    numbers = all(type(value) is int for n, value in arguments.items() if n not in further)
    if not (numbers and arguments.keys() - further <= parameters.keys()):
        raise ConfigError(f"{name}: has no arguments {dict(arguments)}")
    if name in FAMILIES:
        return factory(**arguments)
    ends = arguments.keys() - further
    if not ends <= {*_CLASSES, *_CHANNELS} or not ends & set(_CLASSES):
        raise ConfigError(f"{name}: is no factory of networks with arguments {dict(arguments)}")
    try:
        model = factory(**arguments)
    except Exception as error:  # whatever the user's code raises
        line = " ".join(str(error).split())
        raise ConfigError(f"{name}: failed with {type(error).__name__}: {line}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name}: made a {type(model).__name__}, not a torch.nn.Module")
    return model


def check_ends(name: str, model: fx.GraphModule, *, in_channels: int, classes: int) -> None:
    """Raise ConfigError when a network plainly takes other images or gives other answers.

    What is looked at is the convolution that takes the images, and the linear layer that the output
    comes from.
    """
    modules = dict(model.named_modules())
    images = next(node for node in model.graph.nodes if node.op == "placeholder")
    readers = [modules.get(str(node.target)) for node in images.users]
    first = next((layer for layer in readers if isinstance(layer, nn.Conv2d)), None)
    if first is not None and first.in_channels != in_channels:
        raise ConfigError(
            f"{name}: takes images of {first.in_channels} channels, the data has {in_channels};"
            f" choose a network that can be told ({_CHANNELS[0]}), as those of timm can"
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
    """The factory of that name; it has been called with nothing yet. Raises ConfigError."""
    library, _, member = name.partition(":")
    if library == "torchvision":
        return _torchvision(name, member)
    if library == "timm":
        return _timm(name, member)
    return _own(name, library, member)


def _torchvision(name: str, member: str) -> Factory:
    try:
        import_torchvision()
        from torchvision import models
    except ModuleNotFoundError as error:
        raise ConfigError(f"{name}: {error.name} is not installed; {_INSTALL}") from None
    except (ImportError, RuntimeError, OSError) as error:
        line = " ".join(str(error).split())
        raise ConfigError(
            f"{name}: torchvision cannot be imported ({line}); {_SAME_BUILD}"
        ) from None
    if member not in (known := models.list_models(module=models)):
        raise _unknown(name, member, known)

    def factory(*, num_classes: int) -> nn.Module:
        model: nn.Module = models.get_model(member, weights=None, num_classes=num_classes)
        return model

    return factory


def _timm(name: str, member: str) -> Factory:
    try:
        import_torchvision()  # which timm imports
        import timm
    except ModuleNotFoundError as error:
        raise ConfigError(f"{name}: {error.name} is not installed; pip install timm") from None
    except (ImportError, RuntimeError, OSError) as error:  # it imports torchvision
        line = " ".join(str(error).split())
        raise ConfigError(f"{name}: timm cannot be imported ({line}); {_SAME_BUILD}") from None
    if not timm.is_model(member):
        raise _unknown(name, member, timm.list_models())

    def factory(*, num_classes: int, in_chans: int, **further: Any) -> nn.Module:
        model: nn.Module = timm.create_model(
            member, pretrained=False, num_classes=num_classes, in_chans=in_chans, **further
        )
        return model

    return factory


def _own(name: str, module_name: str, member: str) -> Factory:
    parts = [*module_name.split("."), member]
    if not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{name}: not a network; write mypackage.module:factory")
    if parts[0] in sys.stdlib_module_names:
        raise ConfigError(f"{name}: {parts[0]} is a module of Python's own, and makes no networks")
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


def _parameters(name: str, factory: Factory) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(factory).parameters
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: cannot tell what arguments it takes ({error})") from None


def _unknown(name: str, member: str, known: Iterable[str]) -> ConfigError:
    near = difflib.get_close_matches(member, list(known), n=5, cutoff=0.6)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return ConfigError(f"{name}: there is no network {member} in {name.partition(':')[0]}{hint}")
