"""One frozen decoder in memory under the adapters of several models."""

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel

from gearshift.engine.config.errors import refuse_if
from gearshift.engine.gearbox.adapters import plain_parameters
from gearshift.engine.gearbox.quantised import share_layers
from gearshift.engine.zero.layout import whole_shape


def share(
    module: PreTrainedModel,
    base: PreTrainedModel,
    shared: Callable[[nn.Parameter], nn.Parameter],
) -> None:
    """Gives `module`, which is on meta, the decoder's weights of `base`, which may have adapters.

    shared: see zero.layout.sharer. What is no part of the decoder, as a head, stays on meta.
    """
    share_layers(module.base_model, base.base_model)
    theirs = plain_parameters(base.base_model, tied=True)
    made: dict[int, nn.Parameter] = {}  # tied weights share one parameter
    for path, part in module.base_model.named_modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            own = theirs.get(f"{path}.{name}".removeprefix("."))
            of = f"{path}.{name} of {type(module).__name__}"
            problem = f"{of} is not in {type(base).__name__}, so they cannot share a base"
            wrong = own is None or whole_shape(own) != parameter.shape
            refuse_if(wrong, "path", problem, value=repr(base.name_or_path))
            assert own is not None
            if id(own) not in made:
                made[id(own)] = shared(own)
            setattr(part, name, made[id(own)])
