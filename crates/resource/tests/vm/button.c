/* Waits for the power button without the kernel's driver of it, which the guests' kernel packages have as a module that
 * is not in their initramfs: enables the button's event in PM1 (ACPI 6.5, 4.8.3.1) and returns when the kernel, which has no
 * handler, has disabled it again. Both chipsets that QEMU makes have PM1 at 0x600. */
#include <sys/io.h>
#include <unistd.h>

#define PM1_ENABLE 0x602
#define POWER_BUTTON (1 << 8)

int main(void)
{
    if (iopl(3) != 0)
        return 1;
    outw(inw(PM1_ENABLE) | POWER_BUTTON, PM1_ENABLE);
    while (inw(PM1_ENABLE) & POWER_BUTTON)
        usleep(100000);
    return 0;
}
