"""Sums over the pixels of a predicted and a true tile, in one pass; see `scoring.py` for what they mean."""

from libc.math cimport fabs, sqrt
from libc.stdint cimport uint16_t

ctypedef fused Predicted:
    uint16_t
    float
    double

ctypedef fused Truth:
    uint16_t
    float
    double

cdef enum:
    UNKNOWN = 65535
    PIECE = 4096  # partial sums of this many pixels: adding few numbers to many loses digits


def pixel_sums(
    const Predicted[::1] predicted,
    const Truth[::1] true,
    double p_unit,
    double t_unit,
    double p_scale,
    double t_scale,
    double turn4,
    double offset,
    double[::1] out,
):
    """Fill `out` [9] with the number of known pixels, and the sums that `scoring.pixel_sums` lists."""
    cdef Py_ssize_t i, begin, end, n = true.shape[0], count = 0
    cdef double p, t, c, d, g, w = turn4 * p_scale * t_scale
    cdef double s1, s2, cross, abs_d, sse_d, abs_g, sse_g, epe
    cdef double[8] total
    with nogil:
        for i in range(8):
            total[i] = 0
        begin = 0
        while begin < n:
            end = min(begin + <Py_ssize_t>PIECE, n)
            s1 = s2 = cross = abs_d = sse_d = abs_g = sse_g = epe = 0
            for i in range(begin, end):
                if Truth is uint16_t:
                    if true[i] == <int>UNKNOWN:
                        continue
                else:
                    if true[i] != true[i]:
                        continue
                count += 1
                t = true[i] * t_unit
                p = predicted[i] * p_unit
                c = t - offset
                d = p - t
                g = p * p_scale - t * t_scale
                s1 += c
                s2 += c * c
                cross += p * t
                abs_d += fabs(d)
                sse_d += d * d
                abs_g += fabs(g)
                g = g * g
                sse_g += g
                g += w * (p * t)
                epe += sqrt(g) if g > 0 else 0.0  # rounding, where a height is negative
            total[0] += s1
            total[1] += s2
            total[2] += cross
            total[3] += abs_d
            total[4] += sse_d
            total[5] += abs_g
            total[6] += sse_g
            total[7] += epe
            begin = end
        out[0] = count
        for i in range(8):
            out[i + 1] = total[i]
