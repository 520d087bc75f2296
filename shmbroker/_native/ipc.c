/* ipc.c */
typedef int sb_ipc_placeholder;
