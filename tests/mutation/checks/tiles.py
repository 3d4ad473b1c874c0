"""Smaller tiles for checks."""

import dataclasses


def small_tiles(prefix: str, **blocks: int) -> None:
    """Give these tile sizes to all configurations of some kernels: quick, and all different.

    A matrix has many tiles then, also in groups, and M in N's place is not the same number.
    """
    from pgolf.triton_kernels.launch import configs

    for kernel, rows in configs().items():
        if kernel.startswith(prefix):
            for i, row in enumerate(rows):
                known = {name: size for name, size in blocks.items() if name in row.blocks}
                rows[i] = dataclasses.replace(row, blocks={**row.blocks, **known})
