"""The NVIDIA driver that this host has loaded, as its kernel module says. Standard library only."""

from pathlib import Path

VERSION_FILE = Path("/proc/driver/nvidia/version")


def driver_version(path: Path = VERSION_FILE) -> str:
    """Return the first line that the kernel's module says of itself, in short."""
    try:
        words = path.read_text().partition("\n")[0].split()
    except OSError:
        return f"no NVIDIA driver loaded ({path} is missing)"
    numbers = [word for word in words if word[:1].isdigit() and "." in word]
    return f"NVIDIA driver {numbers[0]}" if numbers else "an NVIDIA driver of unknown version"
