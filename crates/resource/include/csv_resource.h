/*
 * Resource types of csvfs in C, or in any language that can export a C function.
 *
 * A shared library exports one function,
 *
 *     const csv_resource_type *csv_resource_type_get(uint32_t abi);
 *
 * which returns its description for that version of this interface, or NULL when it knows only others. The description and
 * everything that it points to live as long as the process; the library is never unloaded. It is loaded by
 * the resource host (csv-rhs), and by csvd when properties are checked; a resource that should not harm
 * others belongs in a host of its own (separate monitor).
 *
 * Versions: within one version members are only added at the end of a structure; `size` says how much of it is there.
 *
 * Threads: the entry points of one resource are called one after the other, by one thread at a time; those of different
 * resources at the same time. The callbacks in csv_host may be called by any thread, from open until close returns.
 *
 * Entry points return CSV_OK or why not, and then write a text for people to `why` (`why_size` bytes with the
 * final NUL): what happened, and what to do next. They must not let exceptions out.
 *
 * A resource host can be killed at any moment; what a resource manages must go on, and be found again by `adopt` in a next
 * host: keep what that needs with `save`.
 */
#ifndef CSV_RESOURCE_H
#define CSV_RESOURCE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CSV_RESOURCE_ABI 1u

typedef enum csv_status {
    CSV_OK = 0,
    CSV_FAILED = 1,      /* another try, or another node, may help */
    CSV_NOT_HERE = 2,    /* cannot work on this node; another may help */
    CSV_CONFIG = 3,      /* cannot work anywhere before the configuration is changed */
    CSV_UNSUPPORTED = 4, /* control: no such verb */
    CSV_CANCELLED = 5    /* given up, since `cancelled` said so */
} csv_status;

typedef enum csv_event_level { CSV_INFO = 0, CSV_WARNING = 1, CSV_ERROR = 2 } csv_event_level;

/* What the host offers. `host` is the first argument of every callback. Texts are UTF-8. */
typedef struct csv_host {
    uint32_t abi;
    uint32_t size;
    void *host;
    /* The entry point that runs gets on; extends its time. */
    void (*progress)(void *host, const char *text);
    /* Not 0: nobody waits any more for the entry point that runs. It should return CSV_CANCELLED. */
    int (*cancelled)(void *host);
    /* The resource has failed, for the reason given; NULL takes that back. Told at once, without a poll. */
    void (*report)(void *host, const char *why);
    /* For the log of the cluster; a csv_event_level. */
    void (*event)(void *host, int level, const char *text);
    /* Keeps a text for a next host, until the node boots; NULL forgets it. */
    void (*save)(void *host, const char *text);
    /* Copies the text that was kept, with a final NUL, as much as fits; returns its whole length, 0 for none. */
    size_t (*saved)(void *host, char *buffer, size_t buffer_size);
} csv_host;

typedef struct csv_value {
    const char *name;
    const char *value;
} csv_value;

/* A resource. Valid while open runs: what is needed longer must be copied. */
typedef struct csv_spec {
    uint32_t abi;
    uint32_t size;
    const char *name;
    const char *group;
    const char *node;
    const char *run_dir;   /* lost at boot */
    const char *state_dir; /* kept */
    uint64_t generation;   /* number of the ownership of its group */
    const csv_value *properties;
    size_t properties_count;
    const char *json;      /* everything that is known of it, also of what it depends on */
} csv_spec;

typedef struct csv_property {
    const char *name;
    const char *help;
    const char *fallback; /* value without it, for people; or NULL */
    int required;
} csv_property;

typedef struct csv_resource_type {
    uint32_t abi;  /* CSV_RESOURCE_ABI */
    uint32_t size; /* sizeof(csv_resource_type) */
    const char *name;
    const char *help;
    const csv_property *properties;
    size_t properties_count;
    uint32_t looks_alive_ms; /* between two looks by default */
    uint32_t is_alive_ms;

    /* Starts and changes nothing; `*resource` is handed to the others. `host` stays valid until close returns. */
    csv_status (*open)(const csv_host *host, const csv_spec *spec, void **resource, char *why, size_t why_size);
    csv_status (*online)(void *resource, char *why, size_t why_size);
    csv_status (*offline)(void *resource, char *why, size_t why_size);
    /* Ends it at once, whatever state it is in; CSV_OK means that nothing of it is left on this node. */
    csv_status (*terminate)(void *resource, char *why, size_t why_size);
    /* A quick look; one that fails is followed by is_alive, which decides. */
    csv_status (*looks_alive)(void *resource, char *why, size_t why_size);
    csv_status (*is_alive)(void *resource, char *why, size_t why_size);
    /* Is what an earlier host brought online still there? Starts nothing. NULL: is_alive answers that. */
    csv_status (*adopt)(void *resource, char *why, size_t why_size);
    /* Anything else; arguments and answer are JSON. May be NULL. */
    csv_status (*control)(void *resource, const char *verb, const char *arguments, char *answer, size_t answer_size,
                          char *why, size_t why_size);
    /* Frees the resource, and ends its threads. What is online stays online. */
    void (*close)(void *resource);
} csv_resource_type;

/* The one function that a library exports. */
const csv_resource_type *csv_resource_type_get(uint32_t abi);

#ifdef __cplusplus
}
#endif
#endif
