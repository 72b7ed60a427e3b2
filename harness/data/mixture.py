"""A class-conditional Gaussian mixture with exact score, density, moments and ODE map."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import expand_to
from harness.diffusion.randomness import Keyed
from harness.diffusion.schedules import Schedule


@dataclass(frozen=True)
class GaussianMixture:
    """Each class is an equal mixture of isotropic Gaussians, the null class that of all classes.

    Attributes:
        means: [classes, components, D], float64.
        stds: [classes, components], float64.
    """

    means: Tensor
    stds: Tensor

    @classmethod
    def drawn(
        cls,
        seed: int,
        classes: int,
        components: int,
        dimension: int,
        spread: float,
        stds: tuple[float, float],
    ) -> GaussianMixture:
        """A random mixture: means from N(0, spread^2), deviations uniform in `stds`."""
        keys, index = Keyed("mixture", seed), torch.arange(classes)
        low, high = stds
        means = spread * keys.normal("means", index, (components, dimension)).double()
        return cls(means, low + (high - low) * keys.uniform("stds", index, (components,)))

    def _log_components(self, x: Tensor, alpha: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """log of weight times density of x_t [B, D] by component, [B, classes * components]."""
        means, variances = self._components(x.device)
        alpha, sigma = alpha[:, None], sigma[:, None]
        spread = alpha**2 * variances + sigma**2
        squared = (x.unsqueeze(1) - alpha.unsqueeze(2) * means).square().sum(2)
        log_density = -squared / (2 * spread) - x.shape[1] / 2 * torch.log(2 * math.pi * spread)
        return log_density + self._log_weights(x.device)[labels]

    def _components(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Means [classes * components, D] and variances [classes * components]."""
        return self.means.flatten(0, 1).to(device), self.stds.flatten().to(device) ** 2

    def _log_weights(self, device: torch.device) -> Tensor:
        """log of each component's weight by label, [classes + 1, classes * components].

        The last line, for the null label, weighs all components alike.
        """
        classes, components = self.stds.shape
        own = torch.eye(classes, dtype=torch.float64, device=device)
        member = torch.cat([own, torch.ones_like(own[:1])]).repeat_interleave(components, 1)
        return torch.log(member / member.sum(1, keepdim=True))

    def log_density(self, x_0: Tensor, labels: Tensor) -> Tensor:
        """log p(x_0 | label), float64 [B], of points [B, D] and labels [B]."""
        one = torch.ones(len(x_0), dtype=torch.float64, device=x_0.device)
        return self._log_components(x_0.double(), one, 0 * one, labels).logsumexp(1)

    def posterior_mean(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """E[x_0 | x_t, label], float64 [B, D]; alpha and sigma [B], or [1] if all have one."""
        x_t, (means, variances) = x_t.double(), self._components(x_t.device)
        responsibility = self._log_components(x_t, alpha, sigma, labels).softmax(1)
        alpha = alpha[:, None]
        gain = alpha * variances / (alpha**2 * variances + sigma[:, None] ** 2)
        # A component's own posterior mean is m + gain (x_t - alpha m).
        towards = responsibility * gain
        # Sums and no matrix products: an exact formula stands in no bill of FLOPs.
        own = ((responsibility - alpha * towards).unsqueeze(2) * means).sum(1)
        return own + towards.sum(1, keepdim=True) * x_t

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D] of the mixture of all classes, float64."""
        means, variances = self.means.flatten(0, 1), self.stds.flatten() ** 2
        mean = means.mean(0)
        off = means - mean
        return mean, off.t() @ off / len(off) + variances.mean() * torch.eye(
            len(mean), dtype=torch.float64
        )

    def sample(self, keys: Keyed, index: Tensor, labels: Tensor) -> Tensor:
        """Exact samples [B, D], float32."""
        component = (keys.uniform("component", index) * self.means.shape[1]).long()
        eps = keys.normal("x_0", index, (self.means.shape[2],))
        return (
            self.means[labels, component] + self.stds[labels, component].unsqueeze(1) * eps
        ).float()

    def ode_map(self, x_T: Tensor, labels: Tensor, schedule: Schedule, steps: int = 400) -> Tensor:
        """The end of the sampling ODE from x_T [B, D] at t = 1, float64 [B, D].

        Fourth-order Runge-Kutta on `d x_hat / d sigma_ve = eps`, from sigma_ve at t = 1 down to
        1e-3 on Karras' grid, then the posterior mean. The error is about 1e-6 (tests compare
        twice the steps).
        """
        alpha, sigma = schedule.alpha_sigma(torch.ones((), dtype=torch.float64))
        ends = torch.stack([sigma / alpha, torch.tensor(1e-3, dtype=torch.float64)]) ** (1 / 7)
        grid = (
            ends[0] + torch.linspace(0, 1, steps + 1, dtype=torch.float64) * (ends[1] - ends[0])
        ) ** 7
        x, ones = x_T.double() / alpha, torch.ones(1, dtype=torch.float64)

        def eps(x_hat: Tensor, level: Tensor) -> Tensor:
            scale = (1 + level**2).sqrt()  # any alpha: only x_hat and sigma_ve matter
            return (
                x_hat
                - self.posterior_mean(x_hat / scale, ones / scale, ones * level / scale, labels)
            ) / level

        for i in range(steps):
            h, middle = grid[i + 1] - grid[i], (grid[i] + grid[i + 1]) / 2
            k1 = eps(x, grid[i])
            k2 = eps(x + h / 2 * k1, middle)
            k3 = eps(x + h / 2 * k2, middle)
            k4 = eps(x + h * k3, grid[i + 1])
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x - grid[-1] * eps(x, grid[-1])


class ExactNetwork(nn.Module):
    """The exact eps-prediction of a mixture, as a network."""

    def __init__(self, mixture: GaussianMixture, schedule: Schedule):
        super().__init__()
        self.mixture, self.schedule = mixture, schedule

    def forward(self, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
        """eps [B, C, H, W] for x_t [B, C, H, W] at network times [B]."""
        t = self.schedule.time_from_network(time)
        alpha, sigma = self.schedule.alpha_sigma(t)
        x_0 = self.mixture.posterior_mean(x.flatten(1), alpha, sigma, cond.classes).view_as(x)
        return (x.double() - expand_to(alpha, x).double() * x_0) / expand_to(sigma, x).double()
