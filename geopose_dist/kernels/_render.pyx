"""The colours of the synthetic renderer: what each sight line of _rays.pxd meets, lit by sun and sky.

Material, texture, windows, cast shadow; edges are averaged over three rays. Doors and twin are in render.py. No
Python object is touched inside the loops, so threads may run them side by side.
"""

from libc.math cimport fabsf, sqrtf
from libc.stdint cimport int32_t, uint8_t, uint32_t

from geopose_dist.kernels._rays cimport TOP, Hit, Scene, View, fill_scene, fill_view, look, sunlit

cdef enum:
    SUNNY = 1
    FACADE = 2
    LEAFY = 4

# Columns of the object table; render.py names them for Python.
cdef enum:
    RED = 0
    WALL_RED = 3
    COSINE = 6
    SINE = 7
    FLOOR = 8
    BAY = 9
    GRAIN = 10
    PATCH = 11
    MATERIAL = 12
    STYLE = 13
    GLASS = 14
    RIB = 15

cdef struct Light:
    float sun_x
    float sun_y
    float sun_z
    double run_col
    double run_row
    float spread
    float sun[3]
    float sky[3]

cdef inline uint32_t mix(uint32_t a) noexcept nogil:
    """A 32-bit hash (finaliser of the murmur family), for details that need no generator."""
    a ^= a >> 16
    a *= <uint32_t>0x85EBCA6B
    a ^= a >> 13
    a *= <uint32_t>0xC2B2AE35
    a ^= a >> 16
    return a


cdef inline float unit(uint32_t a) noexcept nogil:
    return <float>(mix(a) >> 8) * <float>(1.0 / 16777216.0)


cdef inline float cell_height(Scene* s, Py_ssize_t row, Py_ssize_t col) noexcept nogil:
    if row < 0 or col < 0 or row >= s.rows or col >= s.cols:
        return 0
    return s.height[row * s.cols + col]


cdef inline float slope(float before, float here, float after, float cell, bint leafy) noexcept nogil:
    """Rise per metre; a side that drops like a wall is left out, a crown keeps its steep sides."""
    cdef float limit = 4 * cell if leafy else 1.4 * cell
    cdef float a = here - before
    cdef float b = after - here
    if fabsf(a) > limit:
        if fabsf(b) > limit:
            return 0
        return b / cell
    if fabsf(b) > limit:
        return a / cell
    return (a + b) / (2 * cell)


cdef inline float grain(Scene* s, Py_ssize_t row, Py_ssize_t col) noexcept nogil:
    return s.noise[(row & s.noise_mask) * (s.noise_mask + 1) + (col & s.noise_mask)]


cdef inline float cloud(Scene* s, float row, float col) noexcept nogil:
    """The texture between its points: for patches that are larger than a cell."""
    cdef Py_ssize_t r = <Py_ssize_t>row
    cdef Py_ssize_t c = <Py_ssize_t>col
    cdef float fr = row - r
    cdef float fc = col - c
    cdef float above = (1 - fc) * grain(s, r, c) + fc * grain(s, r, c + 1)
    cdef float under = (1 - fc) * grain(s, r + 1, c) + fc * grain(s, r + 1, c + 1)
    return (1 - fr) * above + fr * under


cdef inline bint bare(Scene* s, Hit* hit, float nx, float ny) noexcept nogil:
    """Whether the map is lower than the hit a little way along (nx, ny): the wall is exposed on that side."""
    return cell_height(s, <Py_ssize_t>(hit.at_row + 2.5 * ny), <Py_ssize_t>(hit.at_col + 2.5 * nx)) < hit.agl


cdef int shade(Scene* s, Light* light, Hit* hit, float across, float along_sun, float* rgb) noexcept nogil:
    """Linear radiance of what a ray met: material, texture, sun with cast shadow, sky light.

    Returns SUNNY if the sun shines there, plus FACADE if it is the wall of a building, or LEAFY.

    The sun is a disc: (across, along_sun), each within -.5 .. .5, is the point of it that this ray asks.
    """
    cdef int32_t thing = s.ids[hit.row * s.cols + hit.col]
    cdef const float* o = s.objects + 16 * thing
    cdef const float* gain = s.gains + 3 * <int>o[MATERIAL]
    cdef float nx, ny, nz, facing, open_sky, texture, along, part, storey, dim, climb
    cdef float run_col, run_row
    cdef bint leafy = 2 <= <int>o[MATERIAL] <= 3
    cdef bint window
    cdef int k, base
    cdef uint32_t code
    cdef Py_ssize_t shift_row, shift_col
    cdef float here = s.height[hit.row * s.cols + hit.col]
    cdef float lit = 0
    run_col = <float>light.run_col * (1 + light.spread * along_sun) - <float>light.run_row * light.spread * across
    run_row = <float>light.run_row * (1 + light.spread * along_sun) + <float>light.run_col * light.spread * across
    open_sky = s.around[(hit.row >> 2) * s.around_cols + (hit.col >> 2)] - hit.agl
    open_sky = 1 if open_sky < 0 else 1 / (1 + 0.09 * open_sky)
    if hit.kind == TOP or here - hit.agl < 0.6 or leafy:
        nx = -slope(cell_height(s, hit.row, hit.col - 1), here, cell_height(s, hit.row, hit.col + 1), s.cell, leafy)
        ny = -slope(cell_height(s, hit.row - 1, hit.col), here, cell_height(s, hit.row + 1, hit.col), s.cell, leafy)
        nz = 1 / sqrtf(1 + nx * nx + ny * ny)
        facing = (nx * light.sun_x + ny * light.sun_y + light.sun_z) * nz
        if leafy:
            facing = 0.35 * light.sun_z + 0.65 * facing  # leaves let light through
        if facing > 0 and sunlit(s, hit.at_col, hit.at_row, here + 0.3, run_col, run_row):
            lit = facing
        code = mix(<uint32_t>thing)
        shift_row = hit.row + (code & 255)
        shift_col = hit.col + ((code >> 8) & 255)
        texture = 1 + o[GRAIN] * grain(s, shift_row, shift_col) + o[PATCH] * (
            0.45 * cloud(s, shift_row * <float>0.37, shift_col * <float>0.37)
            + 0.7 * cloud(s, hit.row * <float>0.061, hit.col * <float>0.061)
            + 0.7 * cloud(s, hit.row * <float>0.0123 + 91, hit.col * <float>0.0123 + 37))
        if o[RIB] > 0:  # courses of tiles, seams of sheet metal, rows of stalls
            along = (hit.at_col * o[SINE] - hit.at_row * o[COSINE]) * s.cell / o[RIB]
            along = along - <Py_ssize_t>along + (1 if along < 0 else 0)
            texture *= 0.90 + 0.2 * along
        if leafy and here - hit.agl > 0.6:  # seen from the side, a crown darkens downwards
            dim = 1 - 0.09 * (here - hit.agl)
            texture *= dim if dim > 0.45 else 0.45
        base = RED
        dim = nz if nz > 0.5 else 0.5
        open_sky *= 0.6 + 0.4 * dim
        if texture < 0.25:
            texture = 0.25
        for k in range(3):
            rgb[k] = o[base + k] * gain[k] * texture * (lit * light.sun[k] + open_sky * light.sky[k])
        return (SUNNY if lit > 0 else 0) + (LEAFY if leafy else 0)
    # A wall. Its plane follows the building's own axes; of the two that face the viewer, the exposed one.
    nx = o[COSINE]
    ny = o[SINE]
    if not bare(s, hit, nx, ny):
        if bare(s, hit, -nx, -ny):
            nx = -nx
            ny = -ny
        else:
            nx = -o[SINE]
            ny = o[COSINE]
            if not bare(s, hit, nx, ny):
                nx = -nx
                ny = -ny
    facing = nx * light.sun_x + ny * light.sun_y
    if facing > 0 and sunlit(s, hit.at_col + 1.2 * nx, hit.at_row + 1.2 * ny, hit.agl + 0.1, run_col, run_row):
        lit = facing
    along = (-hit.at_col * ny + hit.at_row * nx) * s.cell / o[BAY] + 40000
    storey = hit.agl / o[FLOOR]
    code = mix(<uint32_t>thing * 7919 + <uint32_t>along * 31 + <uint32_t>storey)
    part = along - <Py_ssize_t>along  # the 40000 keeps it positive
    climb = storey - <Py_ssize_t>storey
    window = False
    if o[STYLE] == 1:    # punched windows
        window = 0.22 < part < 0.78 and 0.3 < climb < 0.85
    elif o[STYLE] == 2:  # ribbon windows
        window = 0.35 < climb < 0.85
    elif o[STYLE] == 3:  # curtain wall
        window = part > 0.12 and climb > 0.2
    elif o[STYLE] == 4:  # a few doors and windows
        window = (code & 3) == 0 and 0.25 < part < 0.75 and 0.25 < climb < 0.75
    texture = 1 + 0.10 * grain(s, <Py_ssize_t>(hit.agl * 4), <Py_ssize_t>(along * 9))
    # Near the ground, walls see less sky and more street.
    open_sky = open_sky * (0.5 + 0.2 * (hit.agl / (hit.agl + 8)))
    for k in range(3):
        if window:  # glass shows the sky and a little sun, its tint from pane to pane its own
            dim = o[GLASS] * (0.16 + 0.05 * k + 0.12 * unit(code))
            rgb[k] = dim * (0.25 * lit * light.sun[k] + 2.2 * open_sky * light.sky[k])
        else:
            dim = 0.06 * light.sun_z  # light from the street
            rgb[k] = o[WALL_RED + k] * texture * ((lit + dim) * light.sun[k] + open_sky * light.sky[k])
    return FACADE + (SUNNY if lit > 0 else 0)


cdef inline bint differ(int here, int there, int things, float climb) noexcept nogil:
    """Whether an edge worth more rays runs between two pixels; leaves against leaves are rough anyway."""
    if here & there & LEAFY:
        return False
    return things != 0 or fabsf(climb) > 1 or (here ^ there) & SUNNY


def render(const float[:, ::1] height, const float[:, ::1] fine, const float[:, ::1] coarse, float top, float cell,
           const int32_t[:, ::1] ids, const float[:, ::1] objects, const float[:, ::1] gains,
           const float[:, ::1] around, const float[:, ::1] noise, const double[::1] camera, const float[::1] light_in,
           float[:, :, ::1] rgb, float[:, ::1] agl, float[:, ::1] row, float[:, ::1] col,
           int32_t[:, ::1] seen, uint8_t[:, ::1] kind, uint8_t[:, ::1] lit):
    """As `trace`, with the linear radiance, the object seen, and 1 in `lit` where the sun shines on it.

    Edges of things and shadows, and walls, are averaged over three rays.
    """
    cdef Scene s
    cdef View v
    cdef Light light
    cdef Hit hit
    cdef Py_ssize_t y, x, k, j
    cdef Py_ssize_t rows = agl.shape[0]
    cdef Py_ssize_t cols = agl.shape[1]
    cdef float part[3]
    cdef float total[3]
    cdef bint edge
    cdef int here, thing
    cdef float h
    cdef double offset
    cdef uint32_t salt
    with nogil:
        fill_scene(&s, height, fine, coarse, cell, top)
        s.ids = &ids[0, 0]
        s.objects = &objects[0, 0]
        s.gains = &gains[0, 0]
        s.around = &around[0, 0]
        s.around_cols = around.shape[1]
        s.noise = &noise[0, 0]
        s.noise_mask = noise.shape[0] - 1
        fill_view(&v, camera)
        light.sun_x = light_in[0]
        light.sun_y = light_in[1]
        light.sun_z = light_in[2]
        light.run_col = light_in[3]
        light.run_row = light_in[4]
        light.spread = light_in[5]
        for k in range(3):
            light.sun[k] = light_in[6 + k]
            light.sky[k] = light_in[9 + k]
        for y in range(rows):
            for x in range(cols):
                hit = look(&s, &v, <double>x, <double>y)
                agl[y, x] = hit.agl
                row[y, x] = hit.at_row
                col[y, x] = hit.at_col
                kind[y, x] = hit.kind
                seen[y, x] = s.ids[hit.row * s.cols + hit.col]
                salt = mix(<uint32_t>(y * 65537 + x))
                lit[y, x] = shade(&s, &light, &hit, unit(salt) - 0.5, unit(salt + 1) - 0.5, &rgb[y, x, 0])
        for y in range(rows):
            for x in range(cols):
                edge = lit[y, x] & FACADE
                if not edge:
                    here = lit[y, x]
                    thing = seen[y, x]
                    h = agl[y, x]
                    edge = x > 0 and differ(here, lit[y, x - 1], thing - seen[y, x - 1], h - agl[y, x - 1])
                    edge |= y > 0 and differ(here, lit[y - 1, x], thing - seen[y - 1, x], h - agl[y - 1, x])
                    edge |= x + 1 < cols and differ(here, lit[y, x + 1], thing - seen[y, x + 1], 0)
                    edge |= y + 1 < rows and differ(here, lit[y + 1, x], thing - seen[y + 1, x], 0)
                if not edge:
                    continue
                # With the middle, three rays; the diagonal alternates, so that neighbours fill each other's gaps.
                for k in range(3):
                    total[k] = rgb[y, x, k]
                salt = mix(<uint32_t>(y * 65537 + x))
                for j in range(2):
                    offset = 0.3 if j else -0.3
                    hit = look(&s, &v, x + offset, y + (offset if (x + y) & 1 else -offset))
                    shade(&s, &light, &hit, 0.5 * (unit(salt) - j), 0.5 * (unit(salt + 1) - j), &part[0])
                    for k in range(3):
                        total[k] += part[k]
                for k in range(3):
                    rgb[y, x, k] = total[k] * <float>(1.0 / 3.0)
        for y in range(rows):
            for x in range(cols):
                lit[y, x] &= SUNNY
