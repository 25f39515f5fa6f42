"""Rates, times and sizes as people read them; inside the code all is bytes and seconds."""

from __future__ import annotations


def format_rate(bytes_per_s: float) -> str:
    """A rate with its unit, three digits.

    >>> format_rate(23.91e6), format_rate(5e10)
    ('23.9 MB/s', '50.0 GB/s')
    """
    return _scaled(bytes_per_s, (("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3)), "B/s")


def format_bytes(num_bytes: float) -> str:
    """A size with its unit, three digits.

    >>> format_bytes(131072)
    '131 kB'
    """
    return _scaled(num_bytes, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "B")


def format_time(seconds: float) -> str:
    """A time with its unit, three digits.

    >>> format_time(0.0123), format_time(4e-5), format_time(75)
    ('12.3 ms', '40.0 µs', '75.0 s')
    """
    if seconds == 0:
        return "0 s"
    return _scaled(seconds, (("s", 1.0), ("ms", 1e-3)), "µs", smallest=1e-6)


def counted(number: int, what: str) -> str:
    """A number of things.

    >>> counted(1, "node"), counted(2, "rank")
    ('1 node', '2 ranks')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"


def _scaled(
    value: float, units: tuple[tuple[str, float], ...], base: str, smallest: float = 1.0
) -> str:
    for unit, size in units:
        if abs(value) >= 0.9995 * size:
            return f"{_three_digits(value / size)} {unit}"
    return f"{_three_digits(value / smallest)} {base}"


def _three_digits(value: float) -> str:
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}"
