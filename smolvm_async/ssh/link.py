"""Stub."""


class Link:
    def __init__(self, vm_id, access):
        pass

    async def connect(self):
        return False

    def abort(self):
        pass
