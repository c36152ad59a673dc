"""Stub."""


def find_debian():
    return None


def check_host():
    pass


async def build_debian(on_progress=None):
    raise NotImplementedError
