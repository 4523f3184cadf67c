"""What a sensor and a lidar make of a picture: eight noisy bits, and heights in centimetres with their gaps.

Noise is a hash of the pixel's number, so it needs no generator and does not depend on who computes it. Doors and
twins are in sensor.py.
"""

cimport geopose_dist.kernels._clones
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t

cdef extern from *:
    """
    #include <math.h>
    #include <stdint.h>

    static inline uint32_t gp_mix(uint32_t a) {
        a ^= a >> 16; a *= 0x85EBCA6Bu; a ^= a >> 13; a *= 0xC2B2AE35u; a ^= a >> 16;
        return a;
    }

    /* One row: stretch, look the tone up, add noise (the sum of four bytes of a hash is nearly normal). */
    GP_CLONES
    static void gp_tones(const float *restrict in, const float *restrict gain, const float *restrict offset,
                         const float *restrict tone, float steps, float noise, uint32_t seed, uint32_t first,
                         int count, uint8_t *restrict out) {
        for (int i = 0; i < count; i++) {
            float v = in[i] * gain[i] + offset[i];
            v = v > 0 ? v : 0;
            v = v < steps ? v : steps;
            uint32_t a = gp_mix((first + (uint32_t)i) ^ seed);
            int sum = (int)((a & 255) + ((a >> 8) & 255) + ((a >> 16) & 255) + (a >> 24)) - 510;
            v = tone[(int)v] + noise * (float)sum;
            v = v > 0 ? v : 0;
            v = v < 255 ? v : 255;
            out[i] = (uint8_t)(int)(v + 0.5f);
        }
    }
    """
    void gp_tones(const float*, const float*, const float*, const float*, float, float, uint32_t, uint32_t, int,
                  uint8_t*) noexcept nogil
    uint32_t gp_mix(uint32_t) noexcept nogil


def develop(const float[:, ::1] image, const float[::1] gain, const float[::1] offset, const float[::1] tone,
            float noise, uint32_t seed, uint8_t[:, ::1] out):
    """out = tone[image * gain + offset] + noise, clipped and rounded; rows of pixels, bands interleaved."""
    cdef Py_ssize_t row
    cdef int count = <int>image.shape[1]
    with nogil:
        for row in range(image.shape[0]):
            gp_tones(&image[row, 0], &gain[0], &offset[0], &tone[0], tone.shape[0] - 1, noise, gp_mix(seed),
                     <uint32_t>(row * count), count, &out[row, 0])


def label(const float[:, ::1] agl, const float[:, ::1] row, const float[:, ::1] col, const uint8_t[:, ::1] kind,
          const int32_t[:, ::1] seen, const uint8_t[:, ::1] holes, float step, const uint8_t[::1] gone,
          uint32_t wall_gaps, uint32_t speckle, uint32_t seed, uint16_t[:, ::1] out):
    """out = heights in cm; 65535 in holes (`step` cells to a hole's cell), on things that are `gone`, and by chance.

    wall_gaps and speckle are chances of 2^32 for a pixel of a wall and for any pixel.
    """
    cdef Py_ssize_t y, x, r, c
    cdef uint32_t code, start = gp_mix(seed)
    cdef float per = 1 / step
    with nogil:
        for y in range(agl.shape[0]):
            for x in range(agl.shape[1]):
                r = <Py_ssize_t>(row[y, x] * per)
                c = <Py_ssize_t>(col[y, x] * per)
                r = r if r < holes.shape[0] else holes.shape[0] - 1
                c = c if c < holes.shape[1] else holes.shape[1] - 1
                code = gp_mix(<uint32_t>(y * agl.shape[1] + x) ^ start)
                if holes[r, c] or gone[seen[y, x]] or (kind[y, x] and code < wall_gaps) or gp_mix(code) < speckle:
                    out[y, x] = 65535
                else:
                    out[y, x] = <uint16_t>(agl[y, x] * 100 + <float>0.5)
