"""Whether all that is trained takes part in the loss: what does not gets no gradient, and still decays."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from cofitune.errors import RegionError


def check_unused_parameters(model: nn.Module) -> Callable[[], None]:
    """Watch which trained parameters get a gradient, from now until the returned check is called.

    AdamW's weight decay (DeepSpeed fills a missing gradient with zeros) would shrink the others step by step. The check
    takes the watch off and raises a RegionError where a parameter got none.
    """
    waiting = {name for name, p in model.named_parameters() if p.requires_grad}
    handles = [
        p.register_hook(lambda _, name=name: waiting.discard(name))
        for name, p in model.named_parameters()
        if p.requires_grad
    ]

    def check() -> None:
        for handle in handles:
            handle.remove()
        handles.clear()
        if waiting:
            raise RegionError(
                f"region: {len(waiting)} trained tensors take no part in the loss ({', '.join(sorted(waiting)[:3])}); "
                "weight decay alone would change them: leave their layers or modules out"
            )

    return check
