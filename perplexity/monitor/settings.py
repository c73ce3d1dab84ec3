"""Every number the monitor decides by, with its reason. None names a run.

The healthy runs and the faults that they were chosen by are described in docs/monitor.md.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Thresholds of the signals.

    Losses are in nats a token; "points" are logged training losses, "evaluations" are logged
    validation losses.

    >>> Settings(gap=1.0).gap
    1.0
    """

    # A verdict needs one of these: half a hundred training losses, or evaluations that can show a
    # trend (one, and three in a row above it).
    least_points: int = 50
    least_evaluations: int = 4

    # Noise. A rise or a gap counts where it is larger than this many standard errors and than the
    # floor of its signal.
    standard_errors: float = 4.0
    # Noise of a validation loss as a share of the loss, until evaluations show it: it counts as ...
    noise_prior: float = 0.01
    noise_prior_evaluations: int = 2  # ... this many
    evaluations_in_a_row: int = 3  # one evaluation above the best is chance, three are not

    # Overfitting, divergence: a rise of the validation loss above its best. Healthy runs on FineWeb
    # rise by up to 0.016.
    rise: float = 0.03
    rise_share: float = 0.05  # of a small loss: where it is 0.3, a rise of 0.015 is one
    # Evaluations from which means of many are compared, where single ones are too noisy.
    stretch: int = 5
    # Evaluations that must all have failed to come near the first, and by what share of its loss.
    never_better: int = 10
    never_better_share: float = 0.1
    # Divergence seen by the training loss alone: nats, or this multiple of a small loss.
    train_rise: float = 0.25
    train_rise_share: float = 2.0
    divergence_points: int = 48

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
    # Part of a doubling that the late losses must span: less is not extrapolated to a whole one.
    plateau_span: float = 0.5
    # The doubling before the last may gain this share of the loss: more, and the flat part is young.
    plateau_before: float = 0.015
    frozen_points: int = 32  # at a learning rate of 0
    # Equal validation losses; as a rate decays to 0, three in a row are equal to four digits.
    frozen_evaluations: int = 5
    # No learning at all, from the first step on: fewer points suffice.
    stuck_points: int = 60
    stuck_fall: float = 0.03  # share of the loss that the run fell by at first, at most

    # Spikes: against the median and MAD of the last points that were no outliers. Healthy runs hold
    # single batches 21 robust deviations and 2.65 nats out, and never more than two in a row beyond
    # six deviations.
    spike_deviations: float = 6.0
    spike_floor: float = 0.1
    spike_sustained: int = 5  # points in a row: more than an odd batch
    spike_not_recovered: int = 64
    # A validation text is the same each time: one loss that far above those around it is the model.
    validation_spike: float = 0.5
    validation_spike_evaluations: int = 5  # before it

    # Leakage: validation falls below training by more than at the first evaluations. The lag of the
    # running loss and an easier text alone give up to 0.09 in healthy runs.
    leak_floor: float = 0.15
    leak_evaluations: int = 4

    # Memorised: a training loss this near 0, in nats, for a tenth of the run. Where validation is
    # as low, only a perplexity of 1.01 is degenerate.
    memorised: float = 0.05
    memorised_gap: float = 0.1  # validation above training by as much
    degenerate: float = 0.01
    memorised_points: int = 10  # at the end, of so many in all ...
    memorised_least: int = 30
    # Falls of the training loss within a few steps, at the start of each epoch.
    epoch_fall: float = 0.2
    epoch_share: float = 0.15  # and of the loss
    epoch_points: int = 100
    epoch_jitter: float = 0.1  # of an epoch, by which its place may differ

    # The training loss falls at a restart by more than any step before could explain: data seen
    # again.
    restart_fall: float = 0.15

    gap: float = 0.5  # nats of validation above training, worth a look ...
    gap_share: float = 0.125  # ... and this share of the validation loss
    gap_single: float = 1.0  # nats that fewer than three evaluations suffice for
    uniform_margin: float = 0.05  # nats above ln V

    # Lost weights: losses of exactly 0.0 in a row after one of at least as many nats ...
    lost_level: float = 0.1
    lost_gradients: int = 8  # or gradient norms of NaN in a row, up to the last

    # A loss at or below 0 is no cross-entropy: this share of the points below 0, or none above it.
    negative_share: float = 0.01

    # Evaluation cadence: the usual range is every 500 to 1,000 steps.
    evaluations_wanted: int = 10  # over a run, to see a trend
    steps_without: int = 2000
    evaluation_share: float = 0.2  # of the run's time
