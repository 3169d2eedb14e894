"""Duration formatting: seconds as text for people."""


def format_duration(seconds: float) -> str:
    """Return a duration in at most two units: 1 h 05 min, 12 min 07 s, 4.2 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, remaining_seconds = divmod(round(seconds), 60)
    return (
        f"{minutes} min {remaining_seconds:02} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02} min"
    )
