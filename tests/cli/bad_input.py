"""What the tests of the command line share."""


def multiboot(path):
    """The smallest image that would run: it stops at once through the debug exit port."""
    code = bytes([0xb0, 0x00, 0xe6, 0xf4, 0xf4])
    base = 0x100000
    words = [0x1BADB002, 0x00010000, -(0x1BADB002 + 0x00010000) & 0xffffffff, base, base, 0, 0, base + 32]
    with open(path, "wb") as f:
        f.write(b"".join(w.to_bytes(4, "little") for w in words) + code)
