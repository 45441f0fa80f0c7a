/* Memory that a thread keeps from one call to the next: to get and to clear pages takes longer than a small linear. */
#include "kernel.h"

#include <pthread.h>
#include <stdlib.h>

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
        if (posix_memalign(&own->memory, 64, size)) return own->memory = NULL, NULL;
        own->size = size;
    }
    return own->memory;
}
