"""What enters a layer of the frozen prefix: told of, and given back in place of all that lies below."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cofitune.distributed import all_reduce_max
from cofitune.errors import UserError

if TYPE_CHECKING:
    from cofitune.zero import Engine

Outputs = MutableMapping[int, int | None]  # a layer → how many things it returns in a tuple; None: hidden states alone
Entered = list[object]  # what entered a layer, call by call


class LayerInput:
    """What enters one decoder layer, [B, T, H].

    Attributes:
        first: the layer.
    """

    def __init__(self, model: nn.Module, layers: str, first: int, outputs: Outputs | None = None) -> None:
        """Of one model.

        Args:
            layers: path of the model's list of decoder layers.
            outputs: where to write down what the layers below return; one for all of a model's layers.
        """
        self.first = first
        self._model, self._layers = model, layers
        self._outputs: Outputs = {} if outputs is None else outputs

    @contextmanager
    def capture(self, keep: Callable[[Tensor], None]) -> Iterator[None]:
        """Inside, `keep` is told of it."""

        def tell(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            keep((args[0] if args else kwargs["hidden_states"]).detach())

        def note(index: int) -> Callable[[nn.Module, object, object], None]:
            def look(_: nn.Module, __: object, output: object) -> None:
                self._outputs[index] = len(output) if isinstance(output, tuple) else None

            return look

        places = [self._model.get_submodule(f"{self._layers}.{index}") for index in range(self.first)]
        with ExitStack() as hooks:
            for index, place in enumerate(places):
                hooks.enter_context(place.register_forward_hook(note(index)))
            hooks.enter_context(self._layer.register_forward_pre_hook(tell, with_kwargs=True))
            yield

    @contextmanager
    def replay(self, hidden: Tensor) -> Iterator[None]:
        """Inside, the model's forward pass begins at the layer with `hidden` [B, T, H].

        A stand-in takes the place of the embedding and of each layer below, so that the model's own code still makes
        masks and positions, and ZeRO-3 has nothing to gather there.
        """
        places: Any = self._model.get_submodule(self._layers)
        embedding = self._model.get_input_embeddings()  # type: ignore[operator]
        below = [places[index] for index in range(self.first)]
        self._model.set_input_embeddings(_Given(hidden, embedding, None))  # type: ignore[operator]
        for index, layer in enumerate(below):
            places[index] = _Given(hidden, layer, self._outputs.get(index))
        try:
            yield
        finally:
            self._model.set_input_embeddings(embedding)  # type: ignore[operator]
            for index, layer in enumerate(below):
                places[index] = layer

    @contextmanager
    def record(self, entered: Entered) -> Iterator[None]:
        """Inside, all that enters the layer is copied, each time that it is called."""

        def copy(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            entered.append(_copied((args, kwargs)))

        with self._layer.register_forward_pre_hook(copy, with_kwargs=True):
            yield

    @property
    def _layer(self) -> nn.Module:
        return self._model.get_submodule(f"{self._layers}.{self.first}")


def check_replay(engine: Engine, layer_input: LayerInput, run: Callable[[], Tensor], setting: str) -> None:
    """Run an item once whole and once from what entered the layer, before anything is trained. Every rank must call.

    What enters the layer must be the same bit for bit, and so must the loss, unless the device itself rounds otherwise
    from call to call.

    Args:
        run: gives the item's loss.
        setting: what asked for the prefix cache, for the message.

    Raises:
        UserError: it is not the same, or the model cannot begin there.
    """
    engine.eval()
    try:
        with torch.no_grad():
            reason = replay_difference(layer_input, run)
    finally:
        engine.train()
    if reason:
        kind = getattr(getattr(engine.module, "config", None), "model_type", "of this kind")
        raise UserError(
            f"{setting}: model type {kind} cannot begin at layer {layer_input.first} with what was kept: {reason}; set "
            "it to none",
            everywhere=torch.distributed.get_rank() != 0,
        )


def replay_difference(layer_input: LayerInput, run: Callable[[], Tensor]) -> str | None:
    """What differs between an item's whole run and the one that begins at the layer; None where nothing does."""
    kept: list[Tensor] = []
    whole, replayed = Entered(), Entered()
    with layer_input.record(whole), layer_input.capture(lambda hidden: kept.append(hidden.clone())):
        loss = run()
    if len(kept) != 1:
        return f"it runs {len(kept)} times in one pass"
    if kept[0].dim() != 3:
        return f"what enters it has {kept[0].dim()} dimensions, not those of batch, tokens and hidden size"
    try:
        with ExitStack() as stack:
            stack.enter_context(layer_input.replay(kept[0]))
            stack.enter_context(layer_input.record(replayed))
            again = run()
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return (
            f"its code fails there ({type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''})"
        )
    if not _same(whole, replayed):
        return "it is given more than the hidden states of the layers below"
    differs = not torch.equal(loss, again)
    # all ranks or none: under ZeRO-3 a pass of one rank alone would wait for the others'
    if all_reduce_max(int(differs), loss.device) and torch.equal(loss, run()) and differs:
        return "something above it reads the embedding or the layers below"
    return None


def _copied(value: object) -> object:
    """The same with copies of its tensors."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return tuple(map(_copied, value)) if isinstance(value, tuple | list) else value


def _same(one: object, other: object) -> bool:
    """Whether all tensors in both are the same, and where one has a tensor, so has the other."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return (one is None) == (other is None)


class _Given(nn.Module):
    """Answers with the same hidden states whatever it is asked; what else is read of it is the real module's."""

    def __init__(self, hidden: Tensor, real: nn.Module, outputs: int | None) -> None:
        super().__init__()
        self.__dict__["_real"] = real  # not a part of it: ZeRO-3 would gather what lies in parts
        self._hidden = hidden
        # what a layer returns beside the hidden states is not kept; whoever needs it is found out by `check_replay`
        self._answer = hidden if outputs is None else (hidden, *[None] * (outputs - 1))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)

    def forward(self, *_: object, **__: object) -> Tensor | tuple[Tensor | None, ...]:
        return self._answer
