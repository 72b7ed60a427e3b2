"""What everything above `networks/` knows of a diffusion transformer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.errors import UsageError
from harness.machine import memory
from harness.networks.layers import TimestepEmbedder


class Backbone(nn.Module):
    """A diffusion transformer: images to tokens, blocks of attention, a head back to images.

    Attributes:
        width: width d of the tokens and of the conditioning vector.
        blocks: the transformer blocks, lowest first.
        attentions: each block's self-attention, lowest first. It is a `LinearAttention`, or calls
            torch's `scaled_dot_product_attention` once.
        head: the last module, of which every step of a student may have a copy.
        patch_embedding: the module from images to tokens. Each pass calls it once; its
            convolution is `patch_embedding.proj`.
        scalar_embedders: by name, the embedders of the scalars of `Condition`. They are added to
            the conditioning vector, and their output starts at zero.
    """

    width: int
    blocks: nn.ModuleList
    scalar_embedders: nn.ModuleDict
    head_name: ClassVar[str] = "head"
    """Further heads are the modules `head_name` 2, 3, ... of the network."""

    @property
    @abstractmethod
    def attentions(self) -> Sequence[nn.Module]: ...

    @property
    @abstractmethod
    def head(self) -> nn.Module: ...

    @property
    @abstractmethod
    def patch_embedding(self) -> nn.Module: ...

    @abstractmethod
    def forward(self, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
        """Raw network output.

        Args:
            x: [N, C, H, W], with the extra channels that the network was built with.
            time: [N], the schedule's `network_time`.
            cond: conditions [B] as the network was built. N is a multiple of B: x may hold several
                states of each sample, one after the other.

        Returns:
            [N, C', H, W]; C' is larger than C for networks that predict a variance.

        Raises:
            KeyError: if the conditions lack a scalar that the network was built with.
        """

    @abstractmethod
    def features(
        self, x: Tensor, time: Tensor, cond: Condition, depth: int | None = None
    ) -> tuple[Iterable[Tensor], Tensor]:
        """Image tokens [N, T, d] after each of the lowest `depth` blocks, and the vector [N, d].

        Tokens are read once, and a block may wait until its tokens are asked for.

        Args:
            depth: number of blocks that run; None runs all.
        """

    @abstractmethod
    def reuse(
        self, x: Tensor, time: Tensor, cond: Condition, lowest: int, added: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The output, and what the blocks above the lowest `lowest` add to the tokens [N, T, d].

        Args:
            added: what to add in place of these blocks, which then do not run.
        """

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def last_layer(self, head: nn.Module) -> nn.Linear:
        """The linear layer that ends a head."""
        assert isinstance(head, nn.Linear)
        return head

    def added_weights(self, teacher: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
        """The weights, by name, that a teacher lacks or has in another shape.

        They are embedders of scalars, heads of further steps, and an input with further channels.

        Args:
            teacher: the weights of a network of the same description.
        """
        return {
            name: weight
            for name, weight in self.named_parameters()
            if name not in teacher or teacher[name].shape != weight.shape
        }

    def embed_scalars(self, names: Sequence[str]) -> None:
        """Adds an embedder for each scalar."""
        self.scalar_embedders = nn.ModuleDict(
            {name: TimestepEmbedder(self.width, starts_at_zero=True) for name in names}
        )

    def embedded_scalars(self, cond: Condition) -> list[Tensor]:
        """The embedded scalars [B, d]."""
        return [embedder(cond.scalars[name]) for name, embedder in self.scalar_embedders.items()]

    def load_teacher(self, state: dict[str, Tensor]) -> None:
        """Loads the weights of a network of the same description.

        Embedders of scalars, which that network lacks, keep their own weights. The weights of extra
        input channels become zero.
        """
        own = self.state_dict()
        scalars = {name: own[name] for name in own if name.startswith("scalar_embedders.")}
        (patch,) = (
            name
            for name, value in self.named_parameters()
            if value is self.patch_embedding.proj.weight  # type: ignore[union-attr]
        )
        widened = torch.zeros_like(own[patch])
        widened[:, : state[patch].shape[1]] = state[patch]
        self.load_state_dict({**scalars, **state, patch: widened})


def check_room(depth: int, width: int) -> None:
    """Raises UsageError for a transformer that this machine's memory cannot hold.

    A block has at least 12 width^2 weights: attention and a hidden layer of 4 width. On the meta
    device, where costs are counted, any size has room.
    """
    need = 4.0 * 12 * width**2 * depth
    if torch.get_default_device().type != "meta" and need > (there := memory()):
        raise UsageError(
            f"network: {depth} blocks of width {width} take {need / 1e9:.3g} GB, "
            f"but this machine has {there / 1e9:.3g} GB of memory"
        )
