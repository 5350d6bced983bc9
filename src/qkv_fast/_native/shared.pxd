"""What several Python threads change: without cost in a build of Python that has the GIL.

add_to_count, lock and unlock are for code that holds the GIL where there is one: there the first is
a plain sum and the others do nothing. A forked child finds no lock taken: free-threaded Python stops
all other threads before it forks, and none can be stopped while it holds a lock.

flag and add_to_size are for what the threads of one call share, in any build.
"""

cdef extern from *:
    """
    typedef _Atomic int qkv_flag;
    #ifdef Py_GIL_DISABLED
    typedef PyMutex qkv_lock;
    #ifdef __SANITIZE_THREAD__  /* it does not see how the interpreter orders memory */
    void __tsan_acquire(void *);
    void __tsan_release(void *);
    #define qkv_lock_acquire(lock) (PyMutex_Lock(lock), __tsan_acquire(lock))
    #define qkv_lock_release(lock) (__tsan_release(lock), PyMutex_Unlock(lock))
    #else
    #define qkv_lock_acquire(lock) PyMutex_Lock(lock)
    #define qkv_lock_release(lock) PyMutex_Unlock(lock)
    #endif
    #define qkv_add_to_count(count, n) __atomic_add_fetch(count, n, __ATOMIC_RELAXED)
    #else
    typedef char qkv_lock;
    #define qkv_lock_acquire(lock) ((void)(lock))
    #define qkv_lock_release(lock) ((void)(lock))
    #define qkv_add_to_count(count, n) (*(count) += (n))
    #endif
    #define qkv_load(number) __atomic_load_n(number, __ATOMIC_RELAXED)
    #define qkv_store(number, value) __atomic_store_n(number, value, __ATOMIC_RELAXED)
    #define qkv_add_to_size(size, n) __atomic_fetch_add(size, n, __ATOMIC_RELAXED)
    #define qkv_load_pointer(pointer) __atomic_load_n(pointer, __ATOMIC_ACQUIRE)
    #define qkv_store_pointer(pointer, value) __atomic_store_n(pointer, value, __ATOMIC_RELEASE)
    """
    ctypedef int flag "qkv_flag"
    ctypedef struct Lock "qkv_lock":
        pass
    void lock "qkv_lock_acquire"(Lock *) noexcept
    void unlock "qkv_lock_release"(Lock *) noexcept
    int add_to_count "qkv_add_to_count"(int *count, int n) noexcept     # returns the sum
    int load_int "qkv_load"(const int *) noexcept
    void store_int "qkv_store"(int *, int) noexcept
    void add_to_size "qkv_add_to_size"(Py_ssize_t *, Py_ssize_t) noexcept nogil
    Py_ssize_t load_size "qkv_load"(const Py_ssize_t *) noexcept
    # What was written before a pointer is stored is there for who loads it.
    void *load_pointer "qkv_load_pointer"(void **) noexcept
    void store_pointer "qkv_store_pointer"(void **, void *) noexcept
