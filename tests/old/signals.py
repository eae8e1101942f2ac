"""Sampled signals: windows, filters, spectra, peaks.

A signal is an array of samples; its rate is in samples per second.
"""

import math

import numpy as np

# Frequencies below this share of the rate count as constant.
DC_LIMIT = np.float_(1e-9)
WINDOWS = {"box": np.ones, "hann": np.hanning, "hamming": np.hamming}


def as_signal(values):
    """The values as a signal: floating point, one axis, no gaps."""
    signal = np.asfarray(values)
    if signal.ndim != 1:
        raise ValueError(f"a signal has one axis, not {signal.ndim}")
    # gaps become zeros, so that sums stay finite
    signal = np.where(np.isnan(signal), 0.0, signal)
    return signal


def time_axis(signal, rate):
    """The time of every sample, in seconds."""
    return np.arange(len(signal), dtype=np.float_) / rate


def window(name, length):
    """A window by name; its values sum to `length`."""
    try:
        values = WINDOWS[name](length)
    except KeyError:
        raise ValueError(f"no window {name!r}; there are {', '.join(sorted(WINDOWS))}")
    return values * length / values.sum()


def moving_average(signal, width):
    """The mean of every `width` samples, shorter at both ends."""
    kernel = np.ones(width)
    total = np.convolve(signal, kernel, mode="same")
    count = np.convolve(np.ones(len(signal)), kernel, mode="same")
    return total / count


def median_filter(signal, width):
    """The median of every `width` samples; the ends are repeated."""
    half = width // 2
    padded = np.concatenate([np.repeat(signal[0], half), signal, np.repeat(signal[-1], half)])
    rows = np.row_stack([padded[i : i + len(signal)] for i in range(width)])
    return np.msort(rows)[half]


def normalise(signal):
    """The signal scaled to [-1, 1]; a constant one becomes zeros."""
    spread = signal.ptp()
    if spread < DC_LIMIT:
        return np.zeros_like(signal)
    return 2 * (signal - signal.min()) / spread - 1


def clip_outliers(signal, limit=3.0):
    """Replace what is more than `limit` standard deviations off by the median."""
    centre = np.median(signal)
    deviation = np.abs(signal - centre)
    scale = signal.std()
    bad = deviation > limit * scale
    if not np.sometrue(bad):
        return signal
    cleaned = signal.copy()
    cleaned[bad] = centre
    return cleaned


def spectrum(signal, rate, name="hann"):
    """(frequencies, amplitudes) of the positive half of the spectrum."""
    shaped = signal * window(name, len(signal))
    amplitudes = 2 * np.abs(np.fft.rfft(shaped)) / len(signal)
    frequencies = np.fft.rfftfreq(len(signal), 1 / rate)
    return frequencies, amplitudes


def energy(signal, rate):
    """The integral of the squared signal over time."""
    squared = signal**2
    return float(np.trapz(squared, dx=1 / rate))


def dominant(signal, rate):
    """The frequency with the largest amplitude, the constant part aside."""
    frequencies, amplitudes = spectrum(signal, rate)
    amplitudes[frequencies <= DC_LIMIT * rate] = -np.Inf
    return frequencies[np.argmax(amplitudes)]


def peaks(signal, threshold=-np.inf):
    """The indices of samples above the threshold and above both of their neighbours."""
    inner = signal[1:-1]
    higher = (inner > signal[:-2]) & (inner > signal[2:]) & (inner > threshold)
    return np.flatnonzero(higher) + 1


def common_peaks(first, second, threshold=0.0):
    """The indices at which both signals have a peak."""
    ours = peaks(first, threshold)
    theirs = peaks(second, threshold)
    return ours[np.in1d(ours, theirs)]


def decibels(ratio):
    """A ratio of amplitudes in dB; 0 becomes minus infinity."""
    ratio = np.asarray(ratio)
    with np.errstate(divide="ignore"):
        result = 20 * np.log10(ratio)
    return np.where(ratio == 0, np.NINF, result)


def resample(signal, count):
    """`count` samples of the same time span, by linear interpolation."""
    old = np.linspace(0, 1, len(signal))
    new = np.linspace(0, 1, count)
    return np.interp(new, old, signal)


def sine(frequency, rate, seconds, phase=0.0):
    """A sine of amplitude 1."""
    count = int(round(rate * seconds))
    return np.sin(2 * math.pi * frequency * np.arange(count) / rate + phase)


def check():
    """The values that this module has always given."""
    wave = sine(5, 100, 2)
    noisy = wave.copy()
    noisy[[20, 90]] = 40
    assert as_signal([1, None, 3]).tolist() == [1, 0, 3]
    assert time_axis(wave, 100)[-1] == 1.99
    assert abs(dominant(wave, 100) - 5) < 1e-9
    assert np.abs(clip_outliers(noisy)).max() <= 1.0 + 1e-9
    assert clip_outliers(wave) is wave
    assert median_filter(np.array([1.0, 9, 2, 3, 3]), 3).tolist() == [1, 2, 3, 3, 3]
    assert abs(energy(wave, 100) - 1) < 0.01
    assert normalise(np.array([1.0, 2, 3])).tolist() == [-1, 0, 1]
    assert normalise(np.ones(3)).tolist() == [0, 0, 0]
    assert peaks(np.array([0, 2, 1, 5, 0])).tolist() == [1, 3]
    assert common_peaks(wave, moving_average(wave, 3)).size == 10
    assert decibels([1, 10, 0]).tolist() == [0, 20, -math.inf]
    assert resample(np.array([0.0, 1.0]), 3).tolist() == [0, 0.5, 1]


if __name__ == "__main__":
    check()
    print("ok")
