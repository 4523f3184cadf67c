# Bilinear colours of one output row of the gather, in whole numbers: by SSE2, by AVX2 where the machine has it, and
# plainly elsewhere; all give the same bytes.
from libc.stdint cimport int32_t, uint8_t

cdef extern from *:
    """
    #include <math.h>
    #include <stdint.h>
    #include <string.h>
    #if defined(__SSE2__)
    #include <emmintrin.h>
    #endif
    #if defined(__GNUC__) && defined(__x86_64__)
    #include <immintrin.h>
    #define GP_AVX2 1
    #endif

    typedef struct {
        double y0, x0;         /* place of column 0 of this output row */
        double dy, dx;         /* what the next column adds */
        double end_y, end_x;   /* last row and column of the tile */
        double low_y, low_x;   /* first row and column of the part of it that the arrays hold */
        double last_y, last_x; /* last row and column of that part */
        int rows, cols;        /* of the arrays, at least 2 each */
    } gp_line;

    /* Bilinear colour of the pixels at p0, p0 + 3, p1, p1 + 3. Exact integers, so every build gives the same
       bytes: (top * (128 - wy) + bottom * wy + 8192) >> 14, where top and bottom have 15 bits. */
    static inline void gp_bilinear_plain(const uint8_t *p0, const uint8_t *p1, int32_t wx, int32_t wy, uint8_t *out) {
        int a = wx & 0xffff, b = wx >> 16;
        for (int c = 0; c < 3; c++)
            out[c] = (uint8_t)(((p0[c] * a + p0[c + 3] * b) * (wy & 0xffff)
                                + (p1[c] * a + p1[c + 3] * b) * (wy >> 16) + 8192) >> 14);
    }

    /* The same by SSE2, the baseline of x86-64; reads 7 bytes from p0 and p1, writes 4 to out. */
    static inline void gp_bilinear(const uint8_t *p0, const uint8_t *p1, int32_t wx, int32_t wy, uint8_t *out) {
    #if defined(__SSE2__)
        int32_t a, b, c, d;
        memcpy(&a, p0, 4); memcpy(&b, p0 + 3, 4); memcpy(&c, p1, 4); memcpy(&d, p1 + 3, 4);
        const __m128i zero = _mm_setzero_si128(), wh = _mm_set1_epi32(wx), wv = _mm_set1_epi32(wy);
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

    /* Colours of one output row; the plain form where the quick one would read or write past an end. */
    static void gp_colours_plain(const uint8_t *rgb, const gp_line *line, int n, const int32_t *at, const int32_t *wx,
                                 const int32_t *wy, const uint8_t *fill, uint8_t *out) {
        const int32_t stride = 3 * line->cols, end = (line->rows - 2) * line->cols + line->cols - 2;
        for (int i = 0; i < n; i++, out += 3) {
            const uint8_t *p = rgb + 3 * (Py_ssize_t)at[i];
            if (at[i] < 0)
                memcpy(out, fill, 3);
            else if (at[i] == end || i == n - 1)
                gp_bilinear_plain(p, p + stride, wx[i], wy[i], out);
            else
                gp_bilinear(p, p + stride, wx[i], wy[i], out);
        }
    }

    #ifdef GP_AVX2
    /* The same sums for two pixels at a time where the machine has AVX2. Top and bottom of a pixel are the halves of
       a register; reads 8 bytes from each row, which is past the end for the very last place only. */
    __attribute__((target("avx2")))
    static void gp_colours_avx2(const uint8_t *rgb, const gp_line *line, int n, const int32_t *at, const int32_t *wx,
                                const int32_t *wy, const uint8_t *fill, uint8_t *out) {
        const int32_t stride = 3 * line->cols, end = (line->rows - 2) * line->cols + line->cols - 2;
        /* bytes R0 G0 B0 R1 G1 B1 to 16-bit R0 R1 G0 G1 B0 B1 */
        const __m128i pairs = _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1);
        const __m256i both = _mm256_broadcastsi128_si256(pairs), half = _mm256_set1_epi32(8192);
        int i = 0;
        for (; i + 2 < n; i += 2, out += 6) {
            if ((at[i] | at[i + 1]) < 0 || at[i] == end || at[i + 1] == end) {
                gp_colours_plain(rgb, line, 2, at + i, wx + i, wy + i, fill, out);
                continue;
            }
            const uint8_t *p = rgb + 3 * (Py_ssize_t)at[i], *q = rgb + 3 * (Py_ssize_t)at[i + 1];
            __m256i a = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadl_epi64((const __m128i *)p)),
                                                _mm_loadl_epi64((const __m128i *)(p + stride)), 1);
            __m256i b = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadl_epi64((const __m128i *)q)),
                                                _mm_loadl_epi64((const __m128i *)(q + stride)), 1);
            a = _mm256_madd_epi16(_mm256_shuffle_epi8(a, both), _mm256_set1_epi32(wx[i]));
            b = _mm256_madd_epi16(_mm256_shuffle_epi8(b, both), _mm256_set1_epi32(wx[i + 1]));
            /* tops of both pixels, bottoms of both pixels, then weigh them against each other */
            __m256i top = _mm256_permute2x128_si256(a, b, 0x20), bottom = _mm256_permute2x128_si256(a, b, 0x31);
            __m256i wv = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_set1_epi32(wy[i])),
                                                 _mm_set1_epi32(wy[i + 1]), 1);
            __m256i sum = _mm256_madd_epi16(_mm256_or_si256(top, _mm256_slli_epi32(bottom, 16)), wv);
            sum = _mm256_srli_epi32(_mm256_add_epi32(sum, half), 14);
            sum = _mm256_packus_epi16(_mm256_packs_epi32(sum, sum), sum);
            int32_t first = _mm_cvtsi128_si32(_mm256_castsi256_si128(sum));
            int32_t second = _mm_cvtsi128_si32(_mm256_extracti128_si256(sum, 1));
            memcpy(out, &first, 4);
            memcpy(out + 3, &second, 4);
        }
        gp_colours_plain(rgb, line, n - i, at + i, wx + i, wy + i, fill, out);
    }
    #endif

    static void gp_colours(const uint8_t *rgb, const gp_line *line, int n, const int32_t *at, const int32_t *wx,
                           const int32_t *wy, const uint8_t *fill, uint8_t *out) {
    #ifdef GP_AVX2
        if (__builtin_cpu_supports("avx2")) {
            gp_colours_avx2(rgb, line, n, at, wx, wy, fill, out);
            return;
        }
    #endif
        gp_colours_plain(rgb, line, n, at, wx, wy, fill, out);
    }
    """
    ctypedef struct gp_line:
        double y0, x0, dy, dx, end_y, end_x, low_y, low_x, last_y, last_x
        int rows, cols
    void gp_colours(const uint8_t *rgb, const gp_line *line, int n, const int32_t *at, const int32_t *wx,
                    const int32_t *wy, const uint8_t *fill, uint8_t *out) noexcept nogil
