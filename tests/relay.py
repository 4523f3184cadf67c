"""Carry every packet between two interfaces, late or not at all: `relay.py END OTHER_END`.

What netem does, for kernels without it: raw sockets on both ends of a namespace that has no addresses. Each line on
stdin says from then on: `DELAY_MS LOSS`, of each direction. Draws are seeded, so that a loss of 1 % is one.
`relay.py --plain INTERFACE` makes an interface send packets as they go over a wire: not joined to 64 KiB, and with
their checksums.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import random
import select
import socket
import struct
import sys
import time

ETH_P_ALL = 3
SIOCETHTOOL = 0x8946
OFF = {"checksums": 0x17, "segmentation": 0x1F, "generic segmentation": 0x24, "joining": 0x2C}
"""ethtool's numbers: ETHTOOL_STXCSUM, STSO, SGSO, SGRO."""


def plain(interface: str) -> None:
    """Turn the joining of packets and the leaving out of checksums off."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for number in (OFF["segmentation"], OFF["generic segmentation"], OFF["joining"], OFF["checksums"]):
            asked = ctypes.create_string_buffer(struct.pack("II", number, 0), 8)
            request = struct.pack("16sP", interface.encode(), ctypes.addressof(asked))
            fcntl.ioctl(any_socket, SIOCETHTOOL, request)


def carry(ends: list[str]) -> None:
    """Until stdin ends; a socket hears its own packets as outgoing ones, which are left out."""
    draw = random.Random(0)
    sockets = []
    for end in ends:
        one = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        one.bind((end, 0))
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
        sockets.append(one)
    waiting: list[tuple[float, int, socket.socket, bytes]] = []
    delay_s, loss, count = 0.0, 0.0, 0
    print("ready", flush=True)
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready = select.select([*sockets, sys.stdin], [], [], pause)[0]
        if sys.stdin in ready:
            line = sys.stdin.readline()
            if not line:
                return
            delay_ms, share = line.split()
            delay_s, loss = float(delay_ms) / 1000, float(share)
            print("changed", flush=True)
            continue
        for one in ready:
            try:
                packet, (_, _, kind, *_) = one.recvfrom(65536)
            except OSError:
                continue  # the cable was pulled
            if kind != socket.PACKET_OUTGOING and draw.random() >= loss:
                count += 1
                other = sockets[1 - sockets.index(one)]
                heapq.heappush(waiting, (time.monotonic() + delay_s, count, other, packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, other, packet = heapq.heappop(waiting)
            try:
                other.send(packet)
            except OSError:
                continue  # as above


if __name__ == "__main__":
    if sys.argv[1] == "--plain":
        plain(sys.argv[2])
    else:
        carry(sys.argv[1:3])
