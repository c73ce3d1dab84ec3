"""Every number the monitor decides by, with its reason. None names a run; the healthy curves and
the faults are in tests.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Losses in nats a token, "points" are logged training losses, "evaluations" logged validation
    losses.
    """

    # How much there must be before anything is said.
    least_points: int = 100
    least_evaluations: int = 5

    # Noise. A rise or a gap counts where it is larger than this many standard errors and than the
    # floor of its signal.
    standard_errors: float = 4.0
    # nats of a validation loss about its curve, until enough were seen: it counts as ...
    noise_prior: float = 0.05
    noise_prior_evaluations: int = 2  # ... this many
    evaluations_in_a_row: int = 3  # one evaluation above the best is chance, three are not

    # Overfitting, divergence: a rise of the validation loss above its best. Healthy runs on FineWeb
    # rise by up to 0.016.
    rise: float = 0.03
    # Divergence seen by the training loss alone.
    train_rise: float = 0.25

    # Plateau: the gain projected over the next doubling of the steps, as a share of the loss.
    # Healthy runs gain 0.03 and more.
    plateau_gain: float = 0.005
    plateau_errors: float = 1.0  # or no gain beyond its standard error ...
    plateau_error: float = 0.006  # ... where that is under this share of the loss
    # Or the mean of the last doubling is under the one before by less than this share; healthy runs
    # gain 0.04 and more ...
    plateau_doubling: float = 0.01
    # ... where the standard error of the difference is under this share
    plateau_spread: float = 0.01
    plateau_points: int = 200
    plateau_bins: int = 12
    plateau_evaluations: int = 6

    # Spikes: against the median and MAD of the last points that were no outliers. Healthy runs hold
    # single batches 21 robust deviations and 2.65 nats out, and never more than two in a row beyond
    # six deviations.
    spike_deviations: float = 6.0
    spike_floor: float = 0.1
    spike_sustained: int = 5  # points in a row: more than an odd batch
    spike_not_recovered: int = 64

    # Leakage: validation below training. The lag of the running loss and an easier text alone give
    # up to 0.09 in healthy runs.
    leak_floor: float = 0.15
    leak_evaluations: int = 4
    memorised: float = 0.1  # nats: a perplexity of 1.1

    # The training loss falls at a restart by more than any step before could explain: data seen
    # again.
    restart_fall: float = 0.15

    gap: float = 0.5  # nats of validation above training, worth a look
    uniform_margin: float = 0.05  # nats above ln V

    # Evaluation cadence: the usual range is every 500 to 1,000 steps.
    evaluations_wanted: int = 10  # over a run, to see a trend
    steps_without: int = 2000
    evaluation_share: float = 0.2  # of the run's time
