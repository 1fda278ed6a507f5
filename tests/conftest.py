"""What every test has in common."""

from hypothesis import settings

# No test asserts how long anything takes, and none finds on one machine what it misses on another.
settings.register_profile("polar-mitm", deadline=None, derandomize=True)
settings.load_profile("polar-mitm")
