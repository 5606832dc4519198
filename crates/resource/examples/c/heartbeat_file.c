/*
 * A resource type in C: online is a file that is touched every second by a thread. When somebody removes the file, the thread
 * reports that at once. Shows the whole interface; see csv_resource.h.
 *
 *     cc -shared -fPIC -Wall -o heartbeat_file.so -I../../include heartbeat_file.c -lpthread
 */
#include "csv_resource.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

typedef struct heartbeat {
    const csv_host *host;
    char *path;
    pthread_t thread;
    int running; /* thread is there */
    /* Under the lock. */
    pthread_mutex_t lock;
    pthread_cond_t wake;
    int stop;
    unsigned long beats;
} heartbeat;

static csv_status failed(csv_status status, char *why, size_t why_size, const char *what, const char *path) {
    snprintf(why, why_size, "%s %s: %s", what, path, strerror(errno));
    return status;
}

static void *beat(void *argument) {
    heartbeat *self = argument;
    pthread_mutex_lock(&self->lock);
    while (!self->stop) {
        if (utimensat(AT_FDCWD, self->path, NULL, 0) != 0) {
            char why[512];
            failed(CSV_FAILED, why, sizeof why, "cannot touch", self->path);
            self->host->report(self->host->host, why);
            break;
        }
        self->beats++;
        struct timespec next;
        clock_gettime(CLOCK_MONOTONIC, &next);
        next.tv_sec += 1;
        pthread_cond_timedwait(&self->wake, &self->lock, &next);
    }
    pthread_mutex_unlock(&self->lock);
    return NULL;
}

static csv_status start(heartbeat *self, char *why, size_t why_size) {
    self->stop = 0;
    if (pthread_create(&self->thread, NULL, beat, self) != 0) {
        snprintf(why, why_size, "cannot start a thread");
        return CSV_FAILED;
    }
    self->running = 1;
    return CSV_OK;
}

static void stop(heartbeat *self) {
    if (!self->running)
        return;
    pthread_mutex_lock(&self->lock);
    self->stop = 1;
    pthread_cond_signal(&self->wake);
    pthread_mutex_unlock(&self->lock);
    pthread_join(self->thread, NULL);
    self->running = 0;
}

static csv_status heartbeat_open(const csv_host *host, const csv_spec *spec, void **resource, char *why,
                                 size_t why_size) {
    const char *path = NULL;
    for (size_t i = 0; i < spec->properties_count; i++)
        if (strcmp(spec->properties[i].name, "path") == 0)
            path = spec->properties[i].value;
    if (path == NULL || path[0] != '/') {
        snprintf(why, why_size, "the property \"path\" has to be an absolute path");
        return CSV_CONFIG;
    }
    heartbeat *self = calloc(1, sizeof *self);
    if (self == NULL || (self->path = strdup(path)) == NULL) {
        free(self);
        snprintf(why, why_size, "no memory");
        return CSV_FAILED;
    }
    self->host = host;
    pthread_mutex_init(&self->lock, NULL);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&self->wake, &attributes);
    pthread_condattr_destroy(&attributes);
    *resource = self;
    return CSV_OK;
}

static csv_status heartbeat_online(void *resource, char *why, size_t why_size) {
    heartbeat *self = resource;
    if (self->host->cancelled(self->host->host))
        return CSV_CANCELLED;
    stop(self);
    self->host->progress(self->host->host, "making the file");
    int fd = open(self->path, O_CREAT | O_WRONLY | O_CLOEXEC, 0644);
    if (fd < 0)
        return failed(CSV_NOT_HERE, why, why_size, "cannot make", self->path);
    close(fd);
    self->host->save(self->host->host, self->path);
    self->host->event(self->host->host, CSV_INFO, "the heart beats");
    return start(self, why, why_size);
}

static csv_status heartbeat_terminate(void *resource, char *why, size_t why_size) {
    heartbeat *self = resource;
    stop(self);
    if (unlink(self->path) != 0 && errno != ENOENT)
        return failed(CSV_FAILED, why, why_size, "cannot remove", self->path);
    self->host->save(self->host->host, NULL);
    return CSV_OK;
}

static csv_status heartbeat_is_alive(void *resource, char *why, size_t why_size) {
    heartbeat *self = resource;
    struct stat is;
    return stat(self->path, &is) == 0 ? CSV_OK : failed(CSV_FAILED, why, why_size, "no file", self->path);
}

static csv_status heartbeat_adopt(void *resource, char *why, size_t why_size) {
    heartbeat *self = resource;
    char kept[4096];
    size_t length = self->host->saved(self->host->host, kept, sizeof kept);
    if (length == 0 || length >= sizeof kept || strcmp(kept, self->path) != 0) {
        snprintf(why, why_size, "it was not online here");
        return CSV_FAILED;
    }
    csv_status status = heartbeat_is_alive(resource, why, why_size);
    return status == CSV_OK ? start(self, why, why_size) : status;
}

static csv_status heartbeat_control(void *resource, const char *verb, const char *arguments, char *answer,
                                    size_t answer_size, char *why, size_t why_size) {
    heartbeat *self = resource;
    (void)arguments;
    if (strcmp(verb, "beats") != 0) {
        snprintf(why, why_size, "HeartbeatFile cannot \"%s\"", verb);
        return CSV_UNSUPPORTED;
    }
    pthread_mutex_lock(&self->lock);
    snprintf(answer, answer_size, "{\"beats\": %lu}", self->beats);
    pthread_mutex_unlock(&self->lock);
    return CSV_OK;
}

static void heartbeat_close(void *resource) {
    heartbeat *self = resource;
    stop(self);
    pthread_cond_destroy(&self->wake);
    pthread_mutex_destroy(&self->lock);
    free(self->path);
    free(self);
}

static const csv_property properties[] = {
    {.name = "path", .help = "the file that is touched", .fallback = NULL, .required = 1},
};

static const csv_resource_type type = {
    .abi = CSV_RESOURCE_ABI,
    .size = sizeof(csv_resource_type),
    .name = "HeartbeatFile",
    .help = "A file that is touched every second",
    .properties = properties,
    .properties_count = sizeof properties / sizeof properties[0],
    .looks_alive_ms = 5000,
    .is_alive_ms = 60000,
    .open = heartbeat_open,
    .online = heartbeat_online,
    .offline = heartbeat_terminate,
    .terminate = heartbeat_terminate,
    .looks_alive = heartbeat_is_alive,
    .is_alive = heartbeat_is_alive,
    .adopt = heartbeat_adopt,
    .control = heartbeat_control,
    .close = heartbeat_close,
};

const csv_resource_type *csv_resource_type_get(uint32_t abi) {
    return abi == CSV_RESOURCE_ABI ? &type : NULL;
}
