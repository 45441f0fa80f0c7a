/* Memory that a thread keeps from one call to the next: to get and to clear pages takes longer than a small linear. */
#define _GNU_SOURCE /* madvise */
#include "kernel.h"

#include <pthread.h>
#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

enum { HUGE_PAGE = 2 << 20 };

static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;

struct scratch {
    size_t size;
    void *memory;
};

static void free_scratch(void *scratch) {
    free(((struct scratch *)scratch)->memory);
    free(scratch);
}

static void make_scratch_key(void) { pthread_key_create(&scratch_key, free_scratch); }

void *scratch_of_thread(size_t size) {
    pthread_once(&scratch_once, make_scratch_key);
    struct scratch *own = pthread_getspecific(scratch_key);
    if (!own) {
        own = calloc(1, sizeof *own);
        if (!own || pthread_setspecific(scratch_key, own)) return free(own), NULL;
    }
    if (own->size < size) {
        free(own->memory);
        own->size = 0;
        size_t page = size < HUGE_PAGE ? 64 : HUGE_PAGE;
        size = (size + page - 1) / page * page;
        if (posix_memalign(&own->memory, page, size)) return own->memory = NULL, NULL;
#if defined(__linux__)
        if (page == HUGE_PAGE) madvise(own->memory, size, MADV_HUGEPAGE); /* faster to read; refused, no harm is done */
#endif
        own->size = size;
    }
    return own->memory;
}
