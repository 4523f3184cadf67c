# Runtime dispatch without -march=native: of a function marked GP_CLONES the loader picks the widest clone that the
# machine has. Clones do the same IEEE operations in the same order (setup.py forbids contracting a product and a sum
# into one rounding), so results do not depend on the machine.
cdef extern from *:
    """
    #if !defined(__GNUC__) || defined(__clang__) || !defined(__x86_64__) || !defined(__GLIBC__) \\
        || defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    #define GP_CLONES
    #elif __GNUC__ >= 12
    #define GP_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
    #else
    #define GP_CLONES __attribute__((target_clones("avx2", "default")))
    #endif
    """
