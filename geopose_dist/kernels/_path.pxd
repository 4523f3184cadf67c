# The discrete line of sight, shared by the kernels that follow it: one pixel per step along the axis that the
# direction mostly follows, nearest pixel across it. Rounding is to nearest with halves up, so that the
# NumPy twins can say the same thing (floor(v + 0.5)).
from libc.math cimport fabs, floor


cdef inline double step_length(double dir_y, double dir_x) noexcept nogil:
    """Pixels along the direction per step, 1 .. sqrt(2)."""
    cdef double ay = fabs(dir_y), ax = fabs(dir_x)
    return 1.0 / (ay if ay > ax else ax)


cdef inline Py_ssize_t nearest(double v) noexcept nogil:
    return <Py_ssize_t>floor(v + 0.5)
