/* queue_index.c */
typedef int sb_queue_index_placeholder;
