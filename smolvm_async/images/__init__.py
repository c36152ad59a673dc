"""Where a disk comes from: references, the header check, builders."""
