# cython: language_level=3
"""One-pass gather: each output pixel fetches its colour and height through the composed map.

The map is an affine (output row and column to a place in the raised tile), followed, where heights are
raised, by the shift of the surface seen there along the flow direction. So a sample is resampled once, however
many operations it goes through. Colours are bilinear with weights of 1/128, heights nearest: averaging
over a roof's edge would invent surfaces. Outside the tile: fill colour, NaN, inside = 0.
"""

from libc.math cimport NAN, floor, isfinite

from libc.stdint cimport uint8_t

cdef extern from *:
    """
    #include <string.h>
    #if defined(__SSE2__)
    #include <emmintrin.h>
    #endif

    /* Bilinear colour between the rows p0 and p1 (3 bytes per pixel; the right neighbour is 3 bytes on).
       wx, wy are 0 .. 128. Exact integers, so that every build gives the same bytes:
       horizontal sums of 15 bits, then (top * (128 - wy) + bottom * wy + 8192) >> 14. */
    static inline void gp_bilinear_plain(const unsigned char *p0, const unsigned char *p1,
                                         int wx, int wy, unsigned char *out) {
        for (int c = 0; c < 3; c++) {
            int top = p0[c] * (128 - wx) + p0[c + 3] * wx;
            int bottom = p1[c] * (128 - wx) + p1[c + 3] * wx;
            out[c] = (unsigned char)((top * (128 - wy) + bottom * wy + 8192) >> 14);
        }
    }

    /* The same by SSE2, the baseline of x86-64. Reads 7 bytes from p0 and p1 and writes 4 to out. */
    static inline void gp_bilinear(const unsigned char *p0, const unsigned char *p1,
                                   int wx, int wy, unsigned char *out) {
    #if defined(__SSE2__)
        int a, b, c, d;
        memcpy(&a, p0, 4); memcpy(&b, p0 + 3, 4); memcpy(&c, p1, 4); memcpy(&d, p1 + 3, 4);
        const __m128i zero = _mm_setzero_si128();
        const __m128i wh = _mm_set1_epi32((128 - wx) | (wx << 16)), wv = _mm_set1_epi32((128 - wy) | (wy << 16));
        __m128i top = _mm_unpacklo_epi8(_mm_unpacklo_epi8(_mm_cvtsi32_si128(a), _mm_cvtsi32_si128(b)), zero);
        __m128i bottom = _mm_unpacklo_epi8(_mm_unpacklo_epi8(_mm_cvtsi32_si128(c), _mm_cvtsi32_si128(d)), zero);
        top = _mm_madd_epi16(top, wh);
        bottom = _mm_madd_epi16(bottom, wh);
        __m128i sum = _mm_madd_epi16(_mm_or_si128(top, _mm_slli_epi32(bottom, 16)), wv);
        sum = _mm_srli_epi32(_mm_add_epi32(sum, _mm_set1_epi32(8192)), 14);
        sum = _mm_packus_epi16(_mm_packs_epi32(sum, sum), zero);
        a = _mm_cvtsi128_si32(sum);
        memcpy(out, &a, 4);
    #else
        gp_bilinear_plain(p0, p1, wx, wy, out);
    #endif
    }
    """
    void gp_bilinear(const uint8_t *p0, const uint8_t *p1, int wx, int wy, uint8_t *out) noexcept nogil
    void gp_bilinear_plain(const uint8_t *p0, const uint8_t *p1, int wx, int wy, uint8_t *out) noexcept nogil


cdef inline void colour(const uint8_t *rgb, Py_ssize_t rows, Py_ssize_t cols, double y, double x,
                        uint8_t *out, bint room) noexcept nogil:
    """Bilinear colour at (y, x), already within [0, rows-1] x [0, cols-1]; `room`: a 4th byte may be written."""
    cdef Py_ssize_t iy = <Py_ssize_t>y, ix = <Py_ssize_t>x
    cdef int wy, wx, c
    cdef const uint8_t *p
    cdef uint8_t edge[12]
    if iy > rows - 2:
        iy = rows - 2 if rows > 1 else 0
    if ix > cols - 2:
        ix = cols - 2 if cols > 1 else 0
    wy = <int>((y - iy) * 128.0 + 0.5)
    wx = <int>((x - ix) * 128.0 + 0.5)
    p = rgb + (iy * cols + ix) * 3
    if room and iy + 2 < rows:
        gp_bilinear(p, p + cols * 3, wx, wy, out)
    elif rows > 1 and cols > 1:
        gp_bilinear_plain(p, p + cols * 3, wx, wy, out)
    else:
        # One row or one column: the missing neighbour is the pixel itself.
        for c in range(6):
            edge[c] = p[c if cols > 1 or c < 3 else c - 3]
            edge[6 + c] = p[cols * 3 + (c if cols > 1 or c < 3 else c - 3)] if rows > 1 else edge[c]
        gp_bilinear_plain(edge, edge + 6, wx, wy, out)


def gather(const uint8_t[:, :, ::1] rgb, const float[:, ::1] agl_m, bint has_agl,
           const float[:, ::1] shift, bint has_shift, double dir_y, double dir_x, double agl_per_shift,
           const double[::1] matrix, const uint8_t[::1] fill,
           uint8_t[:, :, ::1] out_rgb, float[:, ::1] out_agl, uint8_t[:, ::1] inside):
    """Fill the outputs; `matrix` maps output (r, c) to the place (m0 r + m1 c + m2, m3 r + m4 c + m5).

    With a shift field the height is shift * agl_per_shift where the surface met is known. Returns the
    number of output pixels outside.
    """
    cdef Py_ssize_t rows = rgb.shape[0], cols = rgb.shape[1]
    cdef Py_ssize_t out_rows = out_rgb.shape[0], out_cols = out_rgb.shape[1], r, c, ny, nx, outside = 0
    cdef double y, x, y0, x0, top = rows - 0.5, right = cols - 0.5, last_y = rows - 1, last_x = cols - 1
    cdef float s, h
    cdef uint8_t *to
    with nogil:
        for r in range(out_rows):
            y0 = matrix[0] * r + matrix[2]
            x0 = matrix[3] * r + matrix[5]
            for c in range(out_cols):
                y = y0 + matrix[1] * c
                x = x0 + matrix[4] * c
                to = &out_rgb[r, c, 0]
                # Half a pixel around the outermost centres still is image. Written so that NaN is outside.
                if y >= -0.5 and y < top and x >= -0.5 and x < right:
                    s = 0
                    if has_shift:
                        s = shift[<Py_ssize_t>(y + 0.5), <Py_ssize_t>(x + 0.5)]
                        y = y + s * dir_y
                        x = x + s * dir_x
                    if y >= -0.5 and y < top and x >= -0.5 and x < right:
                        if has_agl:
                            h = agl_m[<Py_ssize_t>(y + 0.5), <Py_ssize_t>(x + 0.5)]
                            out_agl[r, c] = (s * agl_per_shift if has_shift else h) if isfinite(h) else NAN
                        y = 0 if y < 0 else (last_y if y > last_y else y)
                        x = 0 if x < 0 else (last_x if x > last_x else x)
                        inside[r, c] = 1
                        colour(&rgb[0, 0, 0], rows, cols, y, x, to, c < out_cols - 1)
                        continue
                outside += 1
                inside[r, c] = 0
                to[0] = fill[0]
                to[1] = fill[1]
                to[2] = fill[2]
                if has_agl:
                    out_agl[r, c] = NAN
    return outside


def tone(uint8_t[:, :, ::1] rgb, const uint8_t[:, ::1] table, const signed char[::1] noise,
         const uint8_t[::1] random, bint noisy):
    """In place: table[channel, value], then, if noisy, plus noise[random byte], clipped to 0 .. 255."""
    cdef Py_ssize_t rows = rgb.shape[0], cols = rgb.shape[1], y, x, c, i = 0
    cdef int v
    with nogil:
        for y in range(rows):
            for x in range(cols):
                for c in range(3):
                    v = table[c, rgb[y, x, c]]
                    if noisy:
                        v = v + noise[random[i]]
                        v = 0 if v < 0 else (255 if v > 255 else v)
                        i = i + 1
                    rgb[y, x, c] = <uint8_t>v
