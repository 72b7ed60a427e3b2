"""Noise schedules and level grids.

`x_t = alpha_t x_0 + sigma_t eps` with t = 1 noise and t = 0 data. A grid of levels is a float64
tensor of timesteps that falls from 1 to 0. DiT's level k = 0..999 is t = (k + 1) / 1000.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from harness.errors import UsageError, unknown

NUM_LEVELS = 1000


class Schedule(ABC):
    """The mixture of signal and noise at a timestep, and the network's time input."""

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at timesteps t (any shape, in [0, 1]), float64 of the same shape."""

    @abstractmethod
    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """d alpha / dt and d sigma / dt at timesteps t in (0, 1], float64 of the same shape."""

    @abstractmethod
    def v_weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The weights a and b of the velocity `v = a x_0 + b eps`, float64 of the shape of t.

        They satisfy `alpha b - sigma a = 1`.
        """

    @abstractmethod
    def time_of(self, sigma_ve: Tensor) -> Tensor:
        """The timesteps where sigma / alpha is `sigma_ve` (any shape, >= 0), float64; at most 1."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """The input of the network's time embedding at timesteps t, float32 of the same shape."""

    @abstractmethod
    def time_from_network(self, time: Tensor) -> Tensor:
        """The timesteps of a network's times, float64: the inverse of `network_time`."""


class VPSchedule(Schedule):
    """The variance-preserving schedule of DDPM and DiT (Ho et al. 2020, sec. 4).

    It has 1000 levels with linear betas from 1e-4 to 0.02, `alpha_k^2 = prod_{i<=k} (1 - beta_i)`.
    Between levels log-SNR is linear in t. Below level 0 sigma falls linearly to 0 at t = 0, where
    log-SNR is infinite.
    """

    def __init__(self) -> None:
        betas = torch.linspace(1e-4, 0.02, NUM_LEVELS, dtype=torch.float64)
        alpha_squared = torch.cumprod(1 - betas, 0)
        self._sigma_first = float((1 - alpha_squared[0]).sqrt())
        self._log_snr = torch.log(alpha_squared / (1 - alpha_squared))
        self._copies: dict[torch.device, Tensor] = {}

    def _table(self, device: torch.device) -> Tensor:
        """log-SNR of the levels, float64 [1000].

        Each device gets one copy, because a copy makes the host wait for the device.
        """
        if device not in self._copies:
            self._copies[device] = self._log_snr.to(device)
        return self._copies[device]

    def _place(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log-SNR at the levels below and above t, and the position of t between them in [0, 1]."""
        level = (t * NUM_LEVELS - 1).clamp(0, NUM_LEVELS - 1)
        low = level.floor().long().clamp(max=NUM_LEVELS - 2)
        table = self._table(t.device)
        return table[low], table[low + 1], level - low

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.double()
        log_snr = torch.lerp(*self._place(t))
        sigma = torch.sigmoid(-log_snr).sqrt()
        sigma = torch.where(t * NUM_LEVELS < 1, self._sigma_first * t * NUM_LEVELS, sigma)
        return (1 - sigma**2).sqrt(), sigma

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """From `d alpha / dL = alpha sigma^2 / 2` and `d sigma / dL = -sigma alpha^2 / 2`.

        L is the log-SNR; t >= 1 / 1000.
        """
        alpha, sigma = self.alpha_sigma(t)
        below, above, _ = self._place(t.double())
        slope = (above - below) * NUM_LEVELS
        return slope * alpha * sigma**2 / 2, -slope * sigma * alpha**2 / 2

    def v_weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`v = alpha eps - sigma x_0` (Salimans & Ho 2022, arXiv 2202.00512, appendix D)."""
        alpha, sigma = self.alpha_sigma(t)
        return -sigma, alpha

    def time_of(self, sigma_ve: Tensor) -> Tensor:
        sigma_ve = sigma_ve.double()
        falling = -self._table(sigma_ve.device)
        wanted = 2 * torch.log(sigma_ve)
        low = (torch.searchsorted(falling, wanted) - 1).clamp(0, NUM_LEVELS - 2)
        level = low + (wanted - falling[low]) / (falling[low + 1] - falling[low])
        sigma = sigma_ve / (1 + sigma_ve**2).sqrt()
        below = sigma / self._sigma_first / NUM_LEVELS
        return torch.where(below < 1 / NUM_LEVELS, below, (level + 1) / NUM_LEVELS).clamp(max=1.0)

    def network_time(self, t: Tensor) -> Tensor:
        """DiT's level index, 1000 t - 1."""
        return (t.double() * NUM_LEVELS - 1).float()

    def time_from_network(self, time: Tensor) -> Tensor:
        return (time.double() + 1) / NUM_LEVELS


class FlowSchedule(Schedule):
    """The linear path of flow matching and SiT (Ma et al. 2024, arXiv 2401.08740, eq. 5).

    alpha = 1 - sigma; the network's time is sigma itself. Without a shift sigma = t.

    Args:
        shift: s > 0 of `sigma = s t / (1 + (s - 1) t)`, which spends more of t on noise (Esser et
            al. 2024, arXiv 2403.03206, eq. 23). So equal steps of t are the shifted steps of the
            pipelines of SD3, FLUX and Sana.
    """

    def __init__(self, shift: float = 1.0):
        self.shift = shift

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.double()
        sigma = self.shift * t / (1 + (self.shift - 1) * t)
        return 1 - sigma, sigma

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        slope = self.shift / (1 + (self.shift - 1) * t.double()) ** 2
        return -slope, slope

    def v_weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`v = eps - x_0`, the derivative of the path by sigma (arXiv 2401.08740, eq. 6)."""
        one = torch.ones_like(t, dtype=torch.float64)
        return -one, one

    def time_of(self, sigma_ve: Tensor) -> Tensor:
        return self.time_from_network(sigma_ve.double() / (1 + sigma_ve.double()))

    def network_time(self, t: Tensor) -> Tensor:
        return self.alpha_sigma(t)[1].float()

    def time_from_network(self, time: Tensor) -> Tensor:
        return time.double() / (self.shift - (self.shift - 1) * time.double())


def few_step_levels(num_steps: int) -> Tensor:
    """The grid of few-step samplers and students, timesteps [S + 1], float64.

    It holds DiT's levels round(1000 k / S) - 1 for k = S..1, then clean data. For S = 4 these are
    999, 749, 499 and 249.
    """
    steps = [round(NUM_LEVELS * k / num_steps) / NUM_LEVELS for k in range(num_steps, -1, -1)]
    return torch.tensor(steps, dtype=torch.float64, device="cpu")


def respaced_levels(num_steps: int) -> Tensor:
    """The grid of DiT's respaced samplers, timesteps [K + 1], float64; K is at least 2.

    It holds DiT's levels round(999 i / (K - 1)) for i = K - 1..0, then clean data. It suits 25 or
    more steps: with 2 the second stands at level 0 (Peebles & Xie 2022, arXiv 2212.09748, code).
    """
    levels = [round((NUM_LEVELS - 1) * i / (num_steps - 1)) for i in range(num_steps - 1, -1, -1)]
    steps = [*((level + 1) / NUM_LEVELS for level in levels), 0.0]
    return torch.tensor(steps, dtype=torch.float64, device="cpu")


GRIDS: dict[str, Callable[[int], Tensor]] = {
    "few-step": few_step_levels,
    "respaced": respaced_levels,
}
"""Grids of levels by name, from the number of steps."""
SCHEDULES: dict[str, type[Schedule]] = {"vp": VPSchedule, "flow": FlowSchedule}
"""Schedules by name; `flow-3` is the flow with shift 3."""


def schedule_of(name: str) -> Schedule:
    """The schedule of a name: `vp`, `flow`, or `flow-SHIFT`. Raises UsageError for another one."""
    kind, _, number = name.partition("-")
    if number and kind == "flow":
        try:
            shift = float(number)
        except ValueError:
            shift = 0.0
        if not 0 < shift < float("inf"):
            raise UsageError(f"schedule is {name}, but a shift must be above 0, as in flow-3")
        return FlowSchedule(shift)
    if name not in SCHEDULES:
        raise unknown("schedule", name, SCHEDULES, "the task")
    return SCHEDULES[name]()
