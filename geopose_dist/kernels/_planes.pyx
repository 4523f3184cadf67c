# cython: language_level=3
"""Pixels from the differences that a `gpz` member stores, and heights between centimetres and metres.

A block holds, plane after plane, each pixel less the one above it (in its first row: less the one before it),
modulo 256 or 65536. So a row is the row above plus the differences: no pixel waits for its neighbour, and the
compiler adds 32 at a time. Colours are stored as green, red - green, blue - green; heights as zigzag numbers, low
bytes before high bytes. The format is told in shards/README.md.
"""

from libc.stdint cimport uint8_t, uint16_t

cdef extern from *:
    """
    #include <math.h>
    #include <stdint.h>
    #include <string.h>
    #if defined(__GNUC__) && defined(__x86_64__)
    #include <immintrin.h>
    #define GP_AVX2 1
    #endif
    #if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__) \
        && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    #define GP_CLONES __attribute__((target_clones("avx2", "default")))
    #else
    #define GP_CLONES
    #endif
    #if defined(__GNUC__)
    #define GP_INLINE static inline __attribute__((always_inline))
    #else
    #define GP_INLINE static inline
    #endif

    GP_INLINE void gp_add_row(uint8_t *restrict row, const uint8_t *restrict above, int n) {
        for (int i = 0; i < n; i++)
            row[i] = (uint8_t)(row[i] + above[i]);
    }

    GP_INLINE void gp_colours_from(int i, const uint8_t *g, const uint8_t *r, const uint8_t *b, int n, uint8_t *out) {
        for (; i < n; i++) {
            out[3 * i] = (uint8_t)(r[i] + g[i]);
            out[3 * i + 1] = g[i];
            out[3 * i + 2] = (uint8_t)(b[i] + g[i]);
        }
    }

    static void gp_row_plain(uint8_t *planes, Py_ssize_t plane, int cols, int left, int width, uint8_t *out) {
        for (int k = 0; k < 3; k++)
            gp_add_row(planes + k * plane, planes + k * plane - cols, cols);
        planes += left;
        gp_colours_from(0, planes, planes + plane, planes + 2 * plane, width, out);
    }

    #ifdef GP_AVX2
    /* The same with 16 pixels of three planes dealt to 48 bytes: byte j of the result is of plane j % 3. */
    __attribute__((target("avx2")))
    static void gp_row_avx2(uint8_t *planes, Py_ssize_t plane, int cols, int left, int width, uint8_t *out) {
        for (int k = 0; k < 3; k++)
            gp_add_row(planes + k * plane, planes + k * plane - cols, cols);
        const uint8_t *g = planes + left, *r = g + plane, *b = r + plane;
        const __m128i r0 = _mm_setr_epi8(0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1, -1, 5);
        const __m128i r1 = _mm_setr_epi8(-1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1, 10, -1);
        const __m128i r2 = _mm_setr_epi8(-1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15, -1, -1);
        const __m128i g0 = _mm_setr_epi8(-1, 0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1, -1);
        const __m128i g1 = _mm_setr_epi8(5, -1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1, 10);
        const __m128i g2 = _mm_setr_epi8(-1, -1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15, -1);
        const __m128i b0 = _mm_setr_epi8(-1, -1, 0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1);
        const __m128i b1 = _mm_setr_epi8(-1, 5, -1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1);
        const __m128i b2 = _mm_setr_epi8(10, -1, -1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15);
        int i = 0;
        for (; i + 16 <= width; i += 16) {
            const __m128i green = _mm_loadu_si128((const __m128i *)(g + i));
            const __m128i red = _mm_add_epi8(_mm_loadu_si128((const __m128i *)(r + i)), green);
            const __m128i blue = _mm_add_epi8(_mm_loadu_si128((const __m128i *)(b + i)), green);
            __m128i *to = (__m128i *)(out + 3 * i);
            _mm_storeu_si128(to, _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(red, r0), _mm_shuffle_epi8(green, g0)),
                                              _mm_shuffle_epi8(blue, b0)));
            _mm_storeu_si128(to + 1, _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(red, r1), _mm_shuffle_epi8(green, g1)),
                                                  _mm_shuffle_epi8(blue, b1)));
            _mm_storeu_si128(to + 2, _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(red, r2), _mm_shuffle_epi8(green, g2)),
                                                  _mm_shuffle_epi8(blue, b2)));
        }
        gp_colours_from(i, g, r, b, width, out);
    }
    #endif

    /* Rows 0 .. top + height of a block of colours, of which those from `top` on are written; stride in bytes. */
    static void gp_undo_rgb(uint8_t *planes, Py_ssize_t rows, int cols, Py_ssize_t top, int left, Py_ssize_t height,
                            int width, uint8_t *out, Py_ssize_t stride) {
        const Py_ssize_t plane = rows * cols;
        void (*undo)(uint8_t *, Py_ssize_t, int, int, int, uint8_t *) = gp_row_plain;
    #ifdef GP_AVX2
        if (__builtin_cpu_supports("avx2"))
            undo = gp_row_avx2;
    #endif
        for (int k = 0; k < 3; k++)
            for (int i = 1; i < cols; i++)
                planes[k * plane + i] = (uint8_t)(planes[k * plane + i] + planes[k * plane + i - 1]);
        if (top == 0)
            gp_colours_from(0, planes + left, planes + plane + left, planes + 2 * plane + left, width, out);
        for (Py_ssize_t r = 1; r < top + height; r++)
            undo(planes + r * cols, plane, cols, left, r < top ? 0 : width, r < top ? out : out + (r - top) * stride);
    }

    GP_INLINE uint16_t gp_signed(uint8_t low, uint8_t high) {
        uint16_t z = (uint16_t)(low | high << 8);
        return (uint16_t)((z >> 1) ^ (uint16_t)-(z & 1));
    }

    GP_CLONES static void gp_undo_heights(const uint8_t *restrict low, const uint8_t *restrict high, int cols,
                                          Py_ssize_t top, int left, Py_ssize_t height, int width,
                                          uint16_t *restrict row, char *restrict out, Py_ssize_t stride) {
        for (Py_ssize_t r = 0; r < top + height; r++, low += cols, high += cols) {
            if (r == 0)
                for (int i = 0; i < cols; i++)
                    row[i] = (uint16_t)((i ? row[i - 1] : 0) + gp_signed(low[i], high[i]));
            else
                for (int i = 0; i < cols; i++)
                    row[i] = (uint16_t)(row[i] + gp_signed(low[i], high[i]));
            if (r >= top)
                memcpy(out + (r - top) * stride, row + left, 2 * (size_t)width);
        }
    }

    /* All bits set are NaN. */
    GP_CLONES static void gp_metres(const uint16_t *restrict cm, Py_ssize_t n, float *restrict out) {
        for (Py_ssize_t i = 0; i < n; i++) {
            float m = (float)cm[i] / 100.0f;
            int32_t bits;
            memcpy(&bits, &m, 4);
            bits |= -(cm[i] == 65535);
            memcpy(&out[i], &bits, 4);
        }
    }

    /* Bits of floats above 0 are in the order of the floats, so clipping is done on integers, which needs no branch.
       65533.0 is 0x477ffd00; above infinity, 0x7f800000, come the NaN. Adding 2^23 leaves no bit for a fraction
       (ties to even). */
    GP_CLONES static void gp_centimetres(const float *restrict m, Py_ssize_t n, uint16_t *restrict out) {
        for (Py_ssize_t i = 0; i < n; i++) {
            float x = m[i] * 100.0f;
            int32_t bits, nan;
            memcpy(&bits, &x, 4);
            nan = (bits & 0x7fffffff) > 0x7f800000;
            bits = bits < 0 ? 0 : bits;
            bits = bits > 0x477ffd00 ? 0x477ffd00 : bits;
            memcpy(&x, &bits, 4);
            x = (x + 8388608.0f) - 8388608.0f;
            out[i] = (uint16_t)((int32_t)x | -nan);
        }
    }

    GP_CLONES static void gp_outside(const uint8_t *restrict inside, Py_ssize_t n, uint16_t marker,
                                     uint16_t *restrict out) {
        for (Py_ssize_t i = 0; i < n; i++)
            out[i] = inside[i] ? out[i] : marker;
    }
    """
    void gp_undo_rgb(uint8_t *planes, Py_ssize_t rows, int cols, Py_ssize_t top, int left, Py_ssize_t height,
                     int width, uint8_t *out, Py_ssize_t stride) noexcept nogil
    void gp_undo_heights(const uint8_t *low, const uint8_t *high, int cols, Py_ssize_t top, int left,
                         Py_ssize_t height, int width, uint16_t *row, char *out, Py_ssize_t stride) noexcept nogil
    void gp_metres(const uint16_t *cm, Py_ssize_t n, float *out) noexcept nogil
    void gp_centimetres(const float *m, Py_ssize_t n, uint16_t *out) noexcept nogil
    void gp_outside(const uint8_t *inside, Py_ssize_t n, uint16_t marker, uint16_t *out) noexcept nogil


def undo_rgb(uint8_t[::1] planes, Py_ssize_t rows, Py_ssize_t cols, Py_ssize_t top, Py_ssize_t left,
             uint8_t[:, :, :] out):
    """Fill out[r, c] with pixel (top + r, left + c) of a block of rows x cols; `planes` is used up.

    Pixels of a row of `out` must stand together; its rows need not.
    """
    with nogil:
        gp_undo_rgb(&planes[0], rows, <int>cols, top, <int>left, out.shape[0], <int>out.shape[1], &out[0, 0, 0],
                    out.strides[0])


def undo_heights(const uint8_t[::1] planes, Py_ssize_t rows, Py_ssize_t cols, Py_ssize_t top, Py_ssize_t left,
                 uint16_t[::1] row, uint16_t[:, :] out):
    """The same for heights; `row` has room for `cols`."""
    with nogil:
        gp_undo_heights(&planes[0], &planes[rows * cols], <int>cols, top, <int>left, out.shape[0],
                        <int>out.shape[1], &row[0], <char *>&out[0, 0], out.strides[0])


def metres(const uint16_t[::1] cm, float[::1] out):
    """out = cm / 100, NaN for 65535."""
    with nogil:
        gp_metres(&cm[0], cm.shape[0], &out[0])


def centimetres(const float[:, ::1] m, uint16_t[:, :] out):
    """out = m * 100, rounded, between 0 and 65533; 65535 for NaN. Pixels of a row of `out` must stand together."""
    cdef Py_ssize_t r
    with nogil:
        for r in range(out.shape[0]):
            gp_centimetres(&m[r, 0], out.shape[1], &out[r, 0])


def outside(const uint8_t[:, ::1] inside, uint16_t marker, uint16_t[:, :] out):
    """out = marker where inside is 0; rows of `out` as in `centimetres`."""
    cdef Py_ssize_t r
    with nogil:
        for r in range(out.shape[0]):
            gp_outside(&inside[r, 0], out.shape[1], marker, &out[r, 0])
