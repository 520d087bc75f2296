# message.pxi: included by _core.pyx
