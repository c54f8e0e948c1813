"""The steps of a trace: blocks, mergings, and what else stands between the patches and the head."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Union

import torch
from torch import Tensor

from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.layout import Grid, Groups, Layout, even_shares
from captum_lnstat.recording.sites import AttentionSite
from captum_lnstat.recording.statistics import (
    ResidualShare,
    TokenStatistics,
    accumulation_dtype,
    ratio_share,
    residual_shares,
    shares_by_sigma,
    token_statistics,
    token_variance,
    update_share,
)
from captum_lnstat.trace.cotangent import Cotangent, PullBack, to_children
from captum_lnstat.trace.deviations import Deviations, deviations, less_the_mean
from captum_lnstat.trace.maps import FrozenMap, pull_back

if TYPE_CHECKING:
    from jaxtyping import Float

    from captum_lnstat.recording.recording import NormCall


MergingShare = Literal["uniform", "variance"]


class _Step:
    """What every step is: a change of the residual stream from ``before`` to ``after``."""

    name: str
    before: Float[Tensor, "batch token channel"]
    after: Float[Tensor, "batch token_after out_channel"]
    below: Groups | None  # the tokens before it that lie under each token after it, if not each under itself
    grid: Grid | None  # rows and columns of patch tokens after it, where it may change them

    def shares(self, merging: MergingShare) -> Float[Tensor, "batch parent child"]:
        """Share of a token after it that each of the tokens ``below`` gets; ``merging`` is for patch mergings."""
        assert self.below is not None
        return even_shares(self.below, self.before.dtype)[None]

    def grid_after(self, grid: Grid) -> Grid:
        """Rows and columns of patch tokens after it."""
        return self.grid or grid


@dataclass(frozen=True)
class Block(_Step):
    """One transformer block: ``between = x + attention update``, ``after = between + mlp update``.

    Attributes:
        name: Dotted name of the block.
        site: Its attention.
        layout: How the tokens of ``between`` become the site's queries.
        before: ``x``, the residual stream before the block.
        between: The stream with the attention's update; what the MLP's norm reads, if it comes first.
        after: The stream with the MLP's update; ``between`` itself if no MLP follows.
        path: The affine maps from the site's output, heads joined, to the attention update.
        keys: How the tokens of ``before`` became the site's keys, if not as the queries.
        below: For an attention that pools its queries: the tokens of ``before`` under each token after it.
        carried: For such a block: what of ``before`` the update is added to, after the pooling.
        grid: For such a block: rows and columns of tokens after it.
        norms: The calls of the LayerNorms that read ``base`` and ``between``, if they did; their statistics are known.
        pull_back: For such a block: from the cotangent of ``carried`` to that of ``before``, as in a ``Transition``.
        post_norm: The update was normalised before it was added, and no LayerNorm reads the stream.
        centred: What reads the stream subtracts the mean over the channels. An RMSNorm does not: of tokens and updates,
            mean squares count in the place of variances.
    """

    name: str
    site: AttentionSite
    layout: Layout
    before: Float[Tensor, "batch token channel"]
    between: Float[Tensor, "batch query_token out_channel"]
    after: Float[Tensor, "batch query_token out_channel"]
    path: tuple[FrozenMap, ...]
    keys: Layout | None = None
    below: Groups | None = None
    carried: Float[Tensor, "batch query_token out_channel"] | None = None
    grid: Grid | None = None
    norms: tuple[NormCall, NormCall] | None = None
    pull_back: PullBack | None = None
    post_norm: bool = False
    centred: bool = True

    @property
    def base(self) -> Float[Tensor, "batch query_token out_channel"]:
        """What the attention's update is added to."""
        return self.before if self.carried is None else self.carried

    @property
    def attention_update(self) -> Float[Tensor, "batch query_token out_channel"]:
        """What the attention added to each token."""
        return self.between - self.base

    @cached_property
    def deviations(self) -> Deviations:
        """Its values and its update, less what all tokens have in common."""
        return self.deviations_from_mean(True)

    def forget(self) -> None:
        """Let go of the deviations, which are as large as several streams: what wanted them has read them."""
        self.__dict__.pop("deviations", None)

    def deviations_from_mean(self, from_mean: bool) -> Deviations:
        """The same, or those from zero."""
        check_layout(self)
        keys, update = self.keys or self.layout, self.attention_update
        return deviations(self.site, self.path, self.layout, keys, update, from_mean=from_mean, centred=self.centred)

    @cached_property
    def statistics(self) -> tuple[TokenStatistics, TokenStatistics]:
        """Of every token before and after the attention's update: what the block's two LayerNorms read."""
        second = None if self.norms is None else self.norms[1]
        return self.own_statistics, _statistics(self.between, second, self.centred)

    @cached_property
    def own_statistics(self) -> TokenStatistics:
        """Of every token before the attention's update."""
        return _statistics(self.base, None if self.norms is None else self.norms[0], self.centred)

    def residual_share(self, form: ResidualShare) -> Float[Tensor, "batch query_token"]:
        """The first of ``shares_of``."""
        return self.shares_of(form)[0]

    def shares_of(
        self, form: ResidualShare, by_sigma: slice | None = None
    ) -> tuple[Float[Tensor, "batch query_token"], Float[Tensor, "batch query_token"]]:
        """Share of each token after the attention that is the token before it, 1 where it takes no part; and the rest.

        The rest is found for itself: of a share of all but nothing, the difference from one is rounding.

        Args:
            form: Of what.
            by_sigma: Tokens of which it is that of standard deviations, not of their squares, the variances.

        ``"deviation"``: ``var(x - mean x) / (var(x - mean x) + var(e))``, ``x`` less the mean token and ``e`` the
        update less that of the mean value.
        ``"ratio"`` is a ratio of what two LayerNorms read. In a post-norm block they do not read the stream: the
        update was given its variance by the norm, and ``var(x) / (var(x) + var(d))`` is what the statistics give.
        """
        if form == "deviation":
            apart = less_the_mean(self.base, self._taking_part)
            own, update = token_variance(apart, centred=self.centred), self.deviations.variance
            shares = update_share(own, update), update_share(update, own)
        elif form == "ratio" and not self.post_norm:
            before, joined = self.statistics
            share = ratio_share(before.variance, joined.variance)
            shares = share, 1 - share
        else:
            kind: ResidualShare = "update" if form == "ratio" else form
            shares = residual_shares(self.base, self.attention_update, kind, centred=self.centred)
        covered = self.layout.covered
        if covered is not None:
            shares = torch.where(covered, shares[0], 1.0), torch.where(covered, shares[1], 0.0)
        return shares if by_sigma is None else shares_by_sigma(*shares, by_sigma)

    def mlp_read(self, u: Cotangent) -> Float[Tensor, "batch query_token score"]:
        """``<u_i, MLP update_i>`` of every token."""
        return u.spread(u.read(self.after, self.between))

    @property
    def _taking_part(self) -> Tensor | None:
        """Which tokens are a query or a key; ``None`` for all. A class token that joins later is neither before."""
        queries, keys = self.layout.covered, (self.keys or self.layout).covered
        return None if queries is None or keys is None else queries | keys


def check_layout(block: Block) -> None:
    """Attention has to be from token to token."""
    members = block.layout.gather(block.between[:1, :, :1]).shape[1]
    queries, keys = block.site.shape[2:]
    if queries != members or (block.keys is None and keys != members):
        raise UnsupportedModelError(
            f"the attention of {block.name!r} is {queries} x {keys}, its tokens are "
            f"{members}; expected attention from token to token (not from channel to channel)"
        )


def _statistics(tokens: Tensor, norm: NormCall | None, centred: bool) -> TokenStatistics:
    """Those of the LayerNorm if it read just these tokens, else computed."""
    if norm is not None and norm.input.tensor.data_ptr() == tokens.data_ptr():
        known = norm.statistics.flat()
        if known.variance.shape == tokens.shape[:2]:
            return known
    if not centred:
        square = token_variance(tokens, centred=False)
        return TokenStatistics(torch.zeros_like(square), square)
    return token_statistics(tokens)


@dataclass(frozen=True)
class Merging(_Step):
    """A patch merging: the children of each parent are joined along the channels and mapped to it.

    Attributes:
        name: Dotted name of the merging.
        below: The children of each parent; padding where the grid was odd.
        before: The residual stream before the merging: the children.
        path: The affine maps from the joined children to the parent.
        norm_first: True if the LayerNorm reads the joined children, False if it reads the parent.
        reduction: Weight of the linear map, ``(parent channels, joined channels)``.
        after: The residual stream after the merging.
        grid: Rows and columns of tokens after it, half as many of each.
        centred: The norm subtracts the mean; an RMSNorm does not.
    """

    name: str
    below: Groups
    before: Float[Tensor, "batch child channel"]
    path: tuple[FrozenMap, ...]
    norm_first: bool
    reduction: Float[Tensor, "out in"]
    after: Float[Tensor, "batch parent out"]
    grid: Grid
    centred: bool = True

    def pull_back(self, u: Cotangent) -> tuple[Cotangent, Float[Tensor, "batch score"]]:
        """From the cotangent of the parents to that of the children, and the constant."""
        joined, constant = pull_back(self.path, u)
        # A padded child is a token of zeros: whatever its cotangent is, it contributes nothing.
        return to_children(joined, self.below), constant.sum(1)

    def shares(self, merging: MergingShare) -> Float[Tensor, "batch parent child"]:
        """Share of a merged token that each of its four children gets; padded children get none.

        Args:
            merging: ``"uniform"``: the same for every child. ``"variance"``: the child's share of the variance that
                the merging's LayerNorm divides by. Where the norm reads the joined children (Swin v1) that is the sum
                of ``(x_kc - mean)^2`` over the child's channels; where it reads the parent (Swin v2), the variance of
                the child's part ``W_k x_k`` of it.
        """
        real = self.below.real(accumulation_dtype(self.before))
        if merging == "uniform":
            weight = real.expand(len(self.before), -1, -1)
        elif merging == "variance":
            weight = self._variances() * real if self.below.padded else self._variances()
            # Lost in what is not nothing: of children without a variance every one gets the same.
            weight = weight.add(real, alpha=torch.finfo(weight.dtype).tiny)
        else:
            raise ValueError(f"merging is {merging!r}; expected 'uniform' or 'variance'")
        return weight / weight.sum(-1, keepdim=True)

    def _variances(self) -> Float[Tensor, "batch parent child"]:
        """What each child adds to the variance that the LayerNorm divides by."""
        gathered = self.below.gather(self.before)
        children = gathered.reshape(len(self.before), -1, *gathered.shape[1:])
        if self.norm_first:
            read = children - children.mean((-2, -1), keepdim=True) if self.centred else children
            variances: Tensor = torch.linalg.vecdot(read, read)
            return variances
        weights = self.reduction.to(children.dtype).reshape(len(self.reduction), children.shape[2], -1)
        return token_variance(torch.einsum("bpkc,okc->bpko", children, weights), centred=self.centred)


@dataclass(frozen=True)
class Update(_Step):
    """Something added to each token in place: an MLP of its own, a positional or depthwise convolution.

    Evidence: ``<u, after - before>`` is put on the token. Relevance stays where it is.

    Attributes:
        name: Dotted name of the module.
        before: The residual stream before it.
        after: The residual stream after it.
    """

    name: str
    before: Float[Tensor, "batch token channel"]
    after: Float[Tensor, "batch token channel"]
    below = None
    grid = None


@dataclass(frozen=True)
class Transition(_Step):
    """A change of the tokens that is no attention: a convolutional stage, a pooling, tokens put in another order.

    A token's relevance is shared evenly among the tokens that lie under it. Where ``pull_back`` is not known, the
    evidence ``<u, after>`` is put on the tokens after it, and what lies below is not told apart.

    Attributes:
        name: Dotted name of the module.
        below: The tokens before it under each token after it. A token with none (a class token that joins here)
            gives its relevance to padding.
        before: The residual stream before it.
        after: The residual stream after it.
        grid: Rows and columns of patch tokens after it.
        pull_back: From the cotangent after it to the cotangent before it and the constant, ``(batch, score)``, if it is
            affine.
    """

    name: str
    below: Groups
    before: Float[Tensor, "batch token channel"]
    after: Float[Tensor, "batch token_after out_channel"]
    grid: Grid
    pull_back: PullBack | None = None


Step = Union[Block, Merging, Update, Transition]
