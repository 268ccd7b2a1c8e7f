"""embed.py PROGRAM HEADER: a program's bytes as a C array."""
import sys

with open(sys.argv[1], "rb") as f:
    data = f.read()
with open(sys.argv[2], "w", encoding="ascii") as f:
    f.write("static const unsigned char i386_bytes[] = {\n")
    for n in range(0, len(data), 24):
        f.write("\t" + ", ".join(str(b) for b in data[n:n + 24]) + ",\n")
    f.write("};\n")
