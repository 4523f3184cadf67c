"""What the synthetic renderer's rays meet, without colours: surfaces seen, and cells in the sun; doors in render.py.

The marches themselves are in _rays.pxd. No Python object is touched inside the loops, so threads may run them side
by side.
"""

from libc.stdint cimport uint8_t

from geopose_dist.kernels._rays cimport Hit, Scene, View, fill_scene, fill_view, look, sunlit


def trace(const float[:, ::1] height, const float[:, ::1] fine, const float[:, ::1] coarse, float top,
          const double[::1] camera, float[:, ::1] agl, float[:, ::1] row, float[:, ::1] col, uint8_t[:, ::1] kind):
    """Fill agl (m), row and col (cells), kind (0 top, 1 wall) of the surface seen by each pixel centre."""
    cdef Scene s
    cdef View v
    cdef Hit hit
    cdef Py_ssize_t y, x
    with nogil:
        fill_scene(&s, height, fine, coarse, 1, top)
        fill_view(&v, camera)
        for y in range(agl.shape[0]):
            for x in range(agl.shape[1]):
                hit = look(&s, &v, <double>x, <double>y)
                agl[y, x] = hit.agl
                row[y, x] = hit.at_row
                col[y, x] = hit.at_col
                kind[y, x] = hit.kind


def shadow(const float[:, ::1] height, const float[:, ::1] fine, const float[:, ::1] coarse, float top,
           double run_col, double run_row, float lift, uint8_t[:, ::1] lit):
    """Fill lit (1 where the sun is seen from `lift` metres above the middle of a cell)."""
    cdef Scene s
    cdef Py_ssize_t y, x
    with nogil:
        fill_scene(&s, height, fine, coarse, 1, top)
        for y in range(lit.shape[0]):
            for x in range(lit.shape[1]):
                lit[y, x] = sunlit(&s, x + 0.5, y + 0.5, height[y, x] + lift, run_col, run_row)
